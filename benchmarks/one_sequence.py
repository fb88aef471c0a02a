"""Context parallelism: one sequence on several devices, compared with one device.

    python -m benchmarks.one_sequence --backend jax

The operator, with decays, forward and backward, on 1, 2, ... devices of one host: all GPUs, or
virtual CPU devices where there are none. Each device holds a shard of equal length. Results and
gradients are compared with those of one device. Prints the time of a step, tokens per second, the
speedup over the first row, the memory of each device, and the largest relative difference.
"""

import os
import sys
import time

from benchmarks.arguments import names, parser

REPEATS, STEPS = 5, 4


def parse(argv=None):
    command = parser("benchmarks.one_sequence", __doc__)
    add = command.add_argument
    add("--backend", choices=("jax", "torch"), default="jax")
    add(
        "--devices",
        type=names,
        default=["1", "2"],
        help="numbers of devices to compare (default: 1,2)",
    )
    add(
        "--length",
        type=int,
        default=1 << 20,
        help="tokens of the whole sequence (default: 1048576)",
    )
    add("--heads", type=int, default=16)
    add("--dim", type=int, default=64)
    add("--operator", default="hla2")
    add("--dtype", choices=("bfloat16", "float32"), default="bfloat16")
    add("--implementation", choices=("auto", "portable", "triton"), default="auto")
    arguments = command.parse_args(argv)
    arguments.devices = [int(x) for x in arguments.devices]
    for count in arguments.devices:
        if count < 1 or arguments.length % count:
            command.error(f"--length must be a multiple of each of --devices, not of {count} only")
    return arguments


def use(arguments):
    """Chooses the backend, and as many virtual CPU devices as are asked for."""
    os.environ["KERAS_BACKEND"] = arguments.backend
    if arguments.backend == "jax":
        import jax

        jax.config.update("jax_num_cpu_devices", max(arguments.devices))


def attend(arguments, inputs, context_parallel):
    """The output for query, key, value and log-decay, of the whole sequence or of a shard."""
    from keras_hla.ops import higher_order_attention  # once the backend is chosen

    query, key, value, log_decay = inputs
    return higher_order_attention(
        query,
        key,
        value,
        log_decay=log_decay,
        operator=arguments.operator,
        implementation=arguments.implementation,
        context_parallel=context_parallel,
    )


def report(arguments, rows):
    """Prints rows: number and kind of devices, seconds, bytes in memory of each, differences from
    one device, and bytes that each receives.
    """
    first = None
    for count, kind, seconds, memory, differences, exchanged in rows:
        first = first or seconds
        shown = "" if memory is None else f"  {memory / 1e6:8,.0f} MB per device"
        worst = max(differences)
        print(
            f"{arguments.backend}, {count} devices ({kind}): {1e3 * seconds:9.2f} ms "
            f" {arguments.length / seconds:12,.0f} tokens/s  {first / seconds:5.2f}x speedup{shown}"
            f"  {exchanged / 1e6:.2f} MB exchanged  largest relative difference {worst:.1e}",
            flush=True,
        )
        limit = 1e-5 if arguments.dtype == "float32" else 1e-2
        assert worst < limit, f"{count} devices differ from one: {differences}"


def relative(x, y):
    """RMS of the difference over RMS of `y`."""
    return (((x - y) ** 2).mean() / (y**2).mean()) ** 0.5


def median_time(step, wait):
    """Median seconds of a step, of means over consecutive steps.

    `wait` waits until the devices are idle and, if it is given one, until there is a result.
    """
    seconds = []
    for _ in range(REPEATS):
        wait(None)
        begin = time.perf_counter()
        for _ in range(STEPS):
            result = step()
        wait(result)
        seconds.append((time.perf_counter() - begin) / STEPS)
    return sorted(seconds)[REPEATS // 2]


def main(argv=None):
    arguments = parse(argv)
    use(arguments)
    if arguments.backend == "jax":
        from benchmarks.one_sequence_jax import run
    else:
        from benchmarks.one_sequence_torch import run
    report(arguments, run(arguments))


if __name__ == "__main__":
    sys.exit(main())
