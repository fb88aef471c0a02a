"""Checks programs by `mypy --strict` against the installed package, as its users do.

    python tests/check_types.py

`typed_program.py` must pass; and each of `WRONG` must fail, for the reason given.
"""

from pathlib import Path
import subprocess
import sys
import tempfile

PROGRAM = Path(__file__).with_name("typed_program.py")
WRONG = {
    'keras_hla.layers.HLA("4", 16)': '"HLA" has incompatible type "str"; expected "int"',
    "keras_hla.layers.HLA(4, 16, conv_kernal_size=4)": 'Unexpected keyword argument "conv_kernal',
    'keras_hla.layers.HLA(4, 16, implementation="fast")': "expected \"Literal['auto', 'portable'",
    "keras_hla.layers.HLADecoderBlock(4, 16, return_sequences=True)": '"return_sequences"',
    "keras_hla.layers.HLACell(4)": 'Missing positional argument "key_dim"',
    'keras_hla.ops.higher_order_attention(1, 2, 3, form="fast")': "expected \"Literal['chunked'",
    "keras_hla.operators.get(2)": 'incompatible type "int"; expected "str | Operator"',
    "keras_hla.kernels.choose().why": '"Choice" has no attribute "why"',
    "keras_hla.generate(None, [1], 5, top_k=0.5)": 'incompatible type "float"; expected "int',
    'keras_hla.streaming_model(None).initial_state("2")': 'incompatible type "str"; expected "int"',
    "keras_hla.export_saved_model(None, 2)": 'incompatible type "int"; expected "str | PathLike',
    "keras_hla.distribution.split_sequence(None)": '"context_parallel" in call to "split_sequence"',
    'keras_hla.hub.HLABackbone(256, 2, 4, "64")': 'incompatible type "str"; expected "int"',
    "keras_hla.torch_module.TorchModule()": 'Missing positional argument "layer"',
    "keras_hla.distribution.HLA": "does not explicitly export attribute",  # it is public elsewhere
}


def mypy(program, folder):
    """The exit status and the messages. Keras has no types, which is no error here."""
    (Path(folder) / "program.py").write_text(program, encoding="utf-8")
    options = ("--strict", "--disable-error-code=import-untyped", "--config-file=", "program.py")
    command = [sys.executable, "-m", "mypy", *options]
    result = subprocess.run(command, cwd=folder, capture_output=True, text=True, check=False)
    return result.returncode, result.stdout + result.stderr


def main():
    with tempfile.TemporaryDirectory() as folder:  # apart from the source of the package
        status, messages = mypy(PROGRAM.read_text(encoding="utf-8"), folder)
        assert status == 0, messages
        lines = ["import keras_hla, keras_hla.hub, keras_hla.torch_module", *WRONG]
        status, messages = mypy("\n".join(lines), folder)
    assert status == 1, messages
    for number, message in enumerate(WRONG.values(), 2):
        found = [x for x in messages.splitlines() if x.startswith(f"program.py:{number}: error:")]
        assert any(message in x for x in found), f"{lines[number - 1]}: {messages}"
    print(f"a program is accepted, and {len(WRONG)} mistakes are found")


if __name__ == "__main__":
    main()
