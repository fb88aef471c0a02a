"""Measures the package beside its peers, on one backend; prints a table, saves a CSV and a PNG.

By default the operators alone: forward, and forward with the gradients of queries, keys and values.
With --layers the training step of blocks, layers and models, with --streaming a token that is
written. Results are checked before they are timed, and on a GPU that the kernels ran which were
announced; where that fails there is no time, and the exit status is 1.
"""

import os
from pathlib import Path
import sys

from benchmarks.arguments import names, parser
from benchmarks.cases import KINDS, SHAPES, VOCABULARIES, Case

OPERATORS = ("linear", "hla2", "ahla", "hla3", "hla2_published", "hla3_published")


def parse(argv):
    command = parser("benchmarks", __doc__)
    add = command.add_argument
    add("--backend", choices=("tensorflow", "jax", "torch"), required=True)
    add("--device", choices=("cpu", "gpu"), help="default: a GPU where the backend finds one")
    add(
        "--layers",
        type=names,
        nargs="?",
        const=list(KINDS),
        metavar="KINDS",
        help="the training step of HLA and peers; of blocks,layers,models (default: all)",
    )
    add("--streaming", action="store_true", help="a token from a state, a prefix and a cache")
    add(
        "--shapes",
        type=names,
        help="batch x heads x length x dim [x value_dim], as in 8x16x8192x64,1x4x4096x64; "
        "the width of layers is heads x dim (default: 1x4x4096x64, on a GPU larger)",
    )
    add("--dtypes", type=names, help="default: float32, on a GPU bfloat16")
    add("--operators", type=names, default=["hla2"], help="default: hla2")
    add("--decay", action="store_true", help="of operators: 0.9 to 1 for each head and token")
    add("--implementations", type=names, default=[], help="of ours: auto,portable,triton")
    add("--peers", type=names, help="names, or none; default: all")
    add("--contexts", type=names, default=["512", "2048", "8192", "32768"], help="of caches")
    add("--tokens", type=int, default=1_000_000, help="length of the stream of HLA")
    add("--seconds", type=float, default=2.0, help="for each time (default: 2)")
    add(
        "--jit",
        choices=("auto", "on", "off"),
        default="auto",
        help="torch.compile or XLA; auto is XLA, and with PyTorch for blocks on a GPU both ways",
    )
    add(
        "--process-memory",
        action="store_true",
        help="on a CPU: what a step adds to the peak of a fresh process (takes long)",
    )
    add("--output", type=Path, help="folder for the CSV and the PNG")
    arguments = command.parse_args(argv)
    for operator in arguments.operators:
        if operator not in OPERATORS:
            command.error(f"--operators are of {', '.join(OPERATORS)}, not {operator}")
    for kind in arguments.layers or []:
        if kind not in KINDS:
            command.error(f"--layers are of {', '.join(KINDS)}, not {kind}")
    if arguments.layers and arguments.decay:
        command.error("--decay is for operators: layers are measured without and with it")
    if arguments.layers and any(shape.count("x") != 3 for shape in arguments.shapes or []):
        command.error("with --layers --shapes are batch x heads x length x dim")
    return arguments


def choose_backend(backend, device):
    """Before Keras is imported."""
    os.environ["KERAS_BACKEND"] = backend
    os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")
    # The allocator of glibc before 2.38 does not use again what torch frees, unless it is told to
    # give large blocks back. Read by the processes that measure memory.
    os.environ.setdefault("MALLOC_MMAP_THRESHOLD_", "1000000")
    if device == "cpu":
        os.environ["CUDA_VISIBLE_DEVICES"] = "-1"
        if backend == "jax":
            os.environ["JAX_PLATFORMS"] = "cpu"


def main(argv=None):
    arguments = parse(argv)
    choose_backend(arguments.backend, arguments.device)
    from benchmarks import runtime
    from benchmarks.report import print_table

    backend = runtime.current()
    if arguments.device == "gpu" and not backend.on_gpu():
        print(f"{arguments.backend} finds no GPU.", file=sys.stderr)
        return 2
    print(f"{arguments.backend} on {backend.device_name()}: median milliseconds [quartiles]")
    rows = []
    for part in measure(arguments, backend.on_gpu()):
        print_table(part)
        rows += part
        save(rows, arguments, backend.device_name())  # all so far: a run may be cut off
    return int(any(row.failed for row in rows))


def measure(arguments, on_gpu):
    """Yields lists of rows, one for each table."""
    from benchmarks import contenders, layers, long_stream, models, operators, streaming, trainees

    options = operators.Options(arguments.seconds, arguments.jit, arguments.process_memory)
    if arguments.streaming:
        yield streaming.measure([int(x) for x in arguments.contexts], arguments.tokens, options)
        yield long_stream.measure(arguments.tokens)
        return
    peers = [] if arguments.peers == ["none"] else arguments.peers
    which = trainees.Which(arguments.operators, arguments.implementations, peers)
    for kind in arguments.layers or ["operators"]:
        for case in cases(kind, arguments, on_gpu):
            if kind == "operators":
                yield operators.measure(case, contenders.choose(case, *which), options)
            elif kind == "models":
                yield models.measure(case, which, options)
            else:
                yield layers.measure(kind, case, which, options)


def cases(kind, arguments, on_gpu):
    return [
        Case.parse(shape, dtype=dtype, decay=arguments.decay, vocabulary=vocabulary)
        for shape in arguments.shapes or SHAPES[kind][on_gpu]
        for dtype in arguments.dtypes or ["bfloat16" if on_gpu else "float32"]
        for vocabulary in (VOCABULARIES[on_gpu] if kind == "models" else [None])
    ]


def save(rows, arguments, device):
    if arguments.output is None:
        return
    from benchmarks.plot import save_bars
    from benchmarks.report import save_csv

    arguments.output.mkdir(parents=True, exist_ok=True)
    kind = "layers" if arguments.layers else "streaming" if arguments.streaming else "operators"
    path = arguments.output / f"{kind}_{arguments.backend}"
    save_csv(rows, f"{path}.csv", backend=arguments.backend, device=device)
    try:
        save_bars(rows, f"{path}.png", f"{arguments.backend} on {device}")
    except ImportError as error:
        print(f"No picture: {error}")


if __name__ == "__main__":
    sys.exit(main())
