"""How training and one long sequence scale from one device to all of a host.

    python -m benchmarks.scaling --backend jax --devices 1,2,4,8 --out FOLDER

Each device has the same work, however many there are:

- `data`: data parallel training of a language model, 16 rows of 2,048 tokens per device;
- `mesh`: the same with two devices along the batch, and half of them along the sequences, which are
  as many times longer; of two devices both are along the sequences;
- `sequence`: the operator, forward and backward, on one sequence, 131,072 tokens per device.

Devices are all GPUs, or virtual CPU devices where there are none (with `--size small`). The loss of
the first step, or the output and the gradients of the operator, are compared with one device.
Efficiency is tokens per second and device over those of one device in the same run. Exchanged are
the bytes that a device receives in the collectives of a step.
"""

import argparse
import csv
from pathlib import Path
import sys

from benchmarks.arguments import names, parser
from benchmarks.one_sequence import use

CASES = ("data", "mesh", "sequence")
# Of a model: blocks, heads of 64, rows and tokens per device; of the operator: tokens and heads.
SIZES = {
    "full": {
        "blocks": 12,
        "heads": 12,
        "rows": 16,
        "length": 2048,
        "long": 131_072,
        "long_heads": 16,
    },
    "small": {"blocks": 1, "heads": 1, "rows": 2, "length": 32, "long": 64, "long_heads": 1},
}
VOCABULARY = 256
RATE = 0.01
STEPS = 10


def parse(argv=None):
    command = parser("benchmarks.scaling", __doc__)
    add = command.add_argument
    add("--backend", choices=("jax", "torch"), default="jax")
    add("--devices", type=names, default=["1", "2"], help="numbers of devices (default: 1,2)")
    add("--cases", type=names, default=list(CASES), help=f"of {','.join(CASES)} (default: all)")
    add("--size", choices=tuple(SIZES), default="full")
    add("--dtype", choices=("bfloat16", "float32"), default="bfloat16")
    add("--out", type=Path, help="folder for scaling_BACKEND.csv and .png")
    arguments = command.parse_args(argv)
    arguments.devices = [int(x) for x in arguments.devices]
    wrong = {*arguments.cases} - {*CASES}
    if wrong or min(arguments.devices) < 1 or arguments.devices[0] != 1:
        command.error(f"--cases must be of {CASES}, and --devices numbers that begin with 1")
    for name, value in SIZES[arguments.size].items():
        setattr(arguments, name, value)
    return arguments


def mesh_of(case, count):
    """Devices along the rows and along the sequence; `None` if there is no such mesh."""
    if case == "mesh":
        return None if count % 2 else (min(2, count // 2), max(2, count // 2))
    return (count, 1) if case == "data" else (1, count)


def make_model(arguments):
    """The model, and its loss."""
    import keras  # once the backend is chosen

    from keras_hla.layers import HLADecoderBlock

    keras.utils.set_random_seed(0)
    keras.config.set_dtype_policy({"bfloat16": "mixed_bfloat16"}.get(arguments.dtype, "float32"))
    tokens = keras.Input((None,), dtype="int32")
    x = keras.layers.Embedding(VOCABULARY, 64 * arguments.heads)(tokens)
    for _ in range(arguments.blocks):
        x = HLADecoderBlock(arguments.heads, 64)(x)
    x = keras.layers.RMSNormalization()(x)
    model = keras.Model(tokens, keras.layers.Dense(VOCABULARY, dtype="float32")(x))
    return model, keras.losses.SparseCategoricalCrossentropy(from_logits=True)


def draw(arguments, rows, shards):
    """Tokens of all devices, and the tokens after them."""
    from benchmarks.language_model import text  # once the backend is chosen

    batch, length = rows * arguments.rows, shards * arguments.length
    return text(argparse.Namespace(batch=batch, length=length, vocabulary=VOCABULARY))


def mean_loss(arguments, batch, loss_alone):
    """The mean of `loss_alone` over the rows, as many at a time as a device has in the mesh."""
    few = max(1, arguments.rows * arguments.length // batch[0].shape[1])
    starts = range(0, len(batch[0]), few)
    return sum(float(loss_alone(*(x[i : i + few] for x in batch))) for i in starts) / len(starts)


def run_sequence(arguments, count):
    """The row of `count` devices, by `benchmarks.one_sequence`."""
    if arguments.backend == "jax":
        from benchmarks.one_sequence_jax import run
    else:
        from benchmarks.one_sequence_torch import run
    options = argparse.Namespace(
        backend=arguments.backend,
        devices=sorted({1, count}),  # the first of which the others are compared with
        length=count * arguments.long,
        heads=arguments.long_heads,
        dim=64,
        operator="hla2",
        dtype=arguments.dtype,
        implementation="auto",
    )
    *_, (_, kind, seconds, memory, differences, exchanged) = run(options)
    return kind, seconds, memory, exchanged, max(differences)


def measure(arguments):
    """Yields a row of the table, a dictionary, for each case and number of devices."""
    if arguments.backend == "jax":
        from benchmarks.scaling_jax import train
    else:
        from benchmarks.scaling_torch import train
    for case in arguments.cases:
        first = None
        for count in arguments.devices:
            mesh = mesh_of(case, count) if count > 1 else (1, 1)
            if mesh is None:
                continue
            if case == "sequence":
                found, tokens = run_sequence(arguments, count), count * arguments.long
            else:
                found = train(arguments, *mesh)
                tokens = count * arguments.rows * arguments.length
            kind, seconds, memory, exchanged, difference = found
            first = first or seconds
            limit = 1e-5 if arguments.dtype == "float32" else 1e-2
            assert difference < limit, f"{case}, {count} devices: {difference} from one device"
            yield {
                "case": case,
                "backend": arguments.backend,
                "devices": count,
                "mesh": "{} x {}".format(*mesh),
                "kind": kind,
                "milliseconds": 1e3 * seconds,
                "tokens_per_second": tokens / seconds,
                "efficiency": first / seconds,
                "megabytes_per_device": memory and memory / 1e6,
                "megabytes_exchanged": exchanged / 1e6 if count > 1 else 0.0,
                "difference": difference,
            }


def show(row):
    memory = row["megabytes_per_device"]
    shown = "" if memory is None else f"{memory:,.0f} MB per device, "
    print(
        f"{row['case']}, {row['backend']}, {row['devices']} devices ({row['mesh']}, {row['kind']}):"
        f" {row['milliseconds']:.2f} ms, {row['tokens_per_second']:,.0f} tokens/s, "
        f"efficiency {row['efficiency']:.0%}, {shown}{row['megabytes_exchanged']:,.2f} MB "
        f"exchanged, difference from one device {row['difference']:.1e}",
        flush=True,
    )


def plot(rows, path):
    """Efficiency against the number of devices."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(5, 3.2), layout="constrained")
    axes = figure.subplots()
    for case in dict.fromkeys(row["case"] for row in rows):
        points = [(x["devices"], x["efficiency"]) for x in rows if x["case"] == case]
        axes.plot(*zip(*points, strict=True), "o-", label=case)
    axes.axhline(0.9, color="gray", linewidth=0.8, linestyle="--")
    axes.set(xlabel="devices", ylabel="efficiency", ylim=(0, 1.1), title=rows[0]["backend"])
    axes.set_xticks(sorted({row["devices"] for row in rows}))
    axes.legend(frameon=False)
    figure.savefig(path, dpi=120)


def main(argv=None):
    arguments = parse(argv)
    use(arguments)
    rows = []
    for row in measure(arguments):
        show(row)
        rows.append(row)
        if arguments.out:  # as they come: a run may be cut short
            arguments.out.mkdir(parents=True, exist_ok=True)
            path = arguments.out / f"scaling_{arguments.backend}.csv"
            with path.open("w", newline="", encoding="utf-8") as file:
                writer = csv.DictWriter(file, row)
                writer.writeheader()
                writer.writerows(rows)
    if arguments.out:
        plot(rows, arguments.out / f"scaling_{arguments.backend}.png")


if __name__ == "__main__":
    sys.exit(main())
