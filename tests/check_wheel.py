"""Installs the built wheel into a fresh environment, and trains, saves and loads a model with it.

python tests/check_wheel.py dist
"""

from pathlib import Path
import subprocess
import sys
import tempfile
import venv
import zipfile

PROGRAM = """
import os
os.environ["KERAS_BACKEND"] = "jax"
import keras
import keras_hla
from keras_hla import distribution, export, kernels, layers, operators, ops, streaming

tokens = keras.Input((None,), dtype="int32")
x = keras.layers.Embedding(32, 16)(tokens)
x = layers.HLADecoderBlock(num_heads=2, key_dim=8)(x)
model = keras.Model(tokens, keras.layers.Dense(32)(x))
model.compile("adam", keras.losses.SparseCategoricalCrossentropy(from_logits=True))
text = keras.random.randint((4, 33), 0, 32, seed=0)
model.fit(text[:, :-1], text[:, 1:], verbose=0)
model.save("model.keras")
loaded = keras.saving.load_model("model.keras")
written = keras_hla.generate(loaded, [1, 2, 3], max_new_tokens=4, temperature=0.0)
assert written.shape == (4,), written.shape
print("keras_hla", keras_hla.__version__, "from", keras_hla.__file__)
"""


def main(dist):
    root = Path(__file__).resolve().parents[1]
    (wheel,) = dist.resolve().glob("*.whl")
    expected = {
        x.relative_to(root).as_posix()
        for x in (root / "keras_hla").rglob("*")
        if x.suffix == ".py" or x.name == "py.typed"
    }
    packed = {x for x in zipfile.ZipFile(wheel).namelist() if ".dist-info/" not in x}
    assert packed == expected, f"only in one of wheel and repository: {packed ^ expected}"
    with tempfile.TemporaryDirectory() as folder:
        venv.create(folder, with_pip=True)
        python = Path(folder, "bin", "python")
        for command in (
            ("-m", "pip", "install", "--quiet", f"keras-hla[jax] @ {wheel.as_uri()}"),
            ("-m", "pip", "check"),
            ("-I", "-c", PROGRAM),
        ):
            subprocess.run([python, *command], cwd=folder, check=True)


if __name__ == "__main__":
    main(Path(sys.argv[1]))
