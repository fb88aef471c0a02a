"""Measures the package beside its peers, on one backend; prints a table, saves a CSV and a PNG.

The default measures the operators alone: forward, and forward with the gradients of queries, keys
and values. --layers measures a training step of blocks, layers and models; --streaming measures the
generation of one token. Results are checked before they are timed. On a GPU it is also checked that
the expected kernels ran. A result that fails a check has no time, and the exit status is 1.

Columns of the tables: median milliseconds with the quartiles in brackets; "ratio", the time of the
last column as a multiple of that in the first row; "MB", memory that a call needs besides its
arguments; "output error" and "gradient error", the largest relative errors; and "implementation",
what computed the result.
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
    add("--device", choices=("cpu", "gpu"), help="default: gpu if the backend finds one, else cpu")
    add(
        "--layers",
        type=names,
        nargs="?",
        const=list(KINDS),
        metavar="KINDS",
        help="measure a training step of HLA and its peers, for blocks,layers,models "
        "(default: all three)",
    )
    add(
        "--streaming",
        action="store_true",
        help="measure generation of one token: from a state, a whole prefix, and a key-value cache",
    )
    add(
        "--shapes",
        type=names,
        help="batch x heads x length x dim [x value_dim], such as 8x16x8192x64,1x4x4096x64; "
        "layers have the width heads x dim (default: 1x4x4096x64, larger on a GPU)",
    )
    add("--dtypes", type=names, help="dtypes to measure (default: float32, on a GPU bfloat16)")
    add(
        "--operators",
        type=names,
        default=["hla2"],
        help=f"of {','.join(OPERATORS)} (default: hla2)",
    )
    add(
        "--decay",
        action="store_true",
        help="decays of 0.9 to 1 for each head and token; for operators",
    )
    add(
        "--implementations",
        type=names,
        default=[],
        help="implementations of keras_hla to measure, of auto,portable,triton (default: auto)",
    )
    add("--peers", type=names, help="names of the peers to measure, or none (default: all)")
    add(
        "--contexts",
        type=names,
        default=["512", "2048", "8192", "32768"],
        help="with --streaming: lengths of prefixes and caches in tokens",
    )
    add(
        "--tokens",
        type=int,
        default=1_000_000,
        help="with --streaming: length of the HLA stream in tokens",
    )
    add("--seconds", type=float, default=2.0, help="seconds to spend on each time (default: 2)")
    add(
        "--jit",
        choices=("auto", "on", "off"),
        default="auto",
        help="compile with torch.compile or XLA; auto is on for XLA and off for PyTorch, where "
        "blocks on a GPU are measured both ways",
    )
    add(
        "--process-memory",
        action="store_true",
        help="on a CPU: memory that a step adds to the peak of a fresh process (slow)",
    )
    add(
        "--output",
        type=Path,
        help="folder for the CSV file and the PNG plot (default: none are saved)",
    )
    arguments = command.parse_args(argv)
    for operator in arguments.operators:
        if operator not in OPERATORS:
            command.error(f"--operators must be of {', '.join(OPERATORS)}. Received: {operator!r}")
    for kind in arguments.layers or []:
        if kind not in KINDS:
            command.error(f"--layers must be of {', '.join(KINDS)}. Received: {kind!r}")
    if arguments.layers and arguments.decay:
        command.error("--decay is for operators. --layers measures with and without decay anyway.")
    if arguments.layers and any(shape.count("x") != 3 for shape in arguments.shapes or []):
        command.error("With --layers, --shapes must be batch x heads x length x dim.")
    return arguments


def choose_backend(backend, device):
    """Sets the environment; to be called before Keras is imported."""
    os.environ["KERAS_BACKEND"] = backend
    os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")
    # The allocator of glibc before 2.38 does not reuse memory that torch frees, unless it returns
    # large blocks to the system. The processes that measure memory read this.
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
        print(f"{arguments.backend} found no GPU.", file=sys.stderr)
        return 2
    print(f"{arguments.backend} on {backend.device_name()}. Times: median [quartiles] in ms.")
    rows = []
    for part in measure(arguments, backend.on_gpu()):
        print_table(part)
        rows += part
        save(rows, arguments, backend.device_name())  # all rows so far, as a run may be interrupted
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
        print(f"No plot was saved: {error}")


if __name__ == "__main__":
    sys.exit(main())
