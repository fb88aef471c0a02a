"""Trains small models with HLA layers and their peers on standard tasks, under JAX.

    python -m benchmarks.learning --task mqar --mixers hla2+conv,linear+conv,softmax --out FOLDER

For each mixer several learning rates are tried with one seed. The rate of the smallest validation
loss is trained with the other seeds. Each replicate is a row of FOLDER/TASK.csv; replicates that
the file holds are not trained again. At the end a table is printed and plotted.

A mixer is an operator with options, such as hla2+conv+decay (options: conv, rope, decay,
multiscale, gate, qk_norm, ridge, unmasked), or one of the peers softmax, softmax+conv, delta,
delta+gate, gru. linear+conv/hla2+conv stands for alternating operators.

Columns of the table: features of the model ("width"); training steps; weights; "state", elements
that a layer keeps of the past at the training length; "rate", the best learning rate, followed by
"(edge)" if it is the smallest or largest that was tried; number of seeds; each test, as mean ±
standard deviation; and "steps to 0.99", the median step at which training accuracy reached 0.99.
"""

import dataclasses
import os
from pathlib import Path
import sys
import time

from benchmarks.arguments import names, parser

MIXERS = "hla2+conv,ahla+conv,linear+conv,hla2+rope,hla2+rope+decay+conv,softmax+conv,gru"

COMPLETE, FAILED, NO_TIME = 0, 1, 3  # exit statuses


def parse(argv):
    from benchmarks.learning.tasks import SIZES, TASKS

    command = parser("benchmarks.learning", __doc__)
    add = command.add_argument
    add("--task", choices=list(TASKS), required=True)
    add("--mixers", type=names, default=names(MIXERS), help=f"mixers to train (default: {MIXERS})")
    add(
        "--backend",
        choices=("jax",),
        default="jax",
        help="the results do not depend on the backend",
    )
    add(
        "--size",
        choices=SIZES,
        default="full",
        help="small is for two CPU cores, full for a large GPU (default: full)",
    )
    add("--width", type=int, help="features of the model, 64 for each head")
    add("--steps", type=int, help="training steps")
    add("--rates", type=names, help="learning rates to try")
    add(
        "--seeds", type=int, default=5, help="seeds to train at the best learning rate (default: 5)"
    )
    add("--at-once", type=int, default=4, help="replicates trained side by side (default: 4)")
    add("--dtype", choices=("float32", "mixed_bfloat16"), default="float32")
    add("--minutes", type=float, help="start no training that is expected to end later")
    add(
        "--out",
        type=Path,
        default=Path("docs/evidence"),
        help="folder for the results (default: docs/evidence)",
    )
    arguments = command.parse_args(argv)
    for name in ("width", "steps", "seeds", "at_once"):
        value = getattr(arguments, name)
        if value is not None and value < 1:
            command.error(f"--{name.replace('_', '-')} must be positive. Received: {value}")
    return arguments


def choose_backend():
    """Sets the environment; to be called before Keras is imported."""
    os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")
    if os.environ.setdefault("KERAS_BACKEND", "jax") != "jax":
        sys.exit(
            "The benchmark trains many models at once, which needs JAX: the environment variable "
            f"KERAS_BACKEND must be 'jax'. Received: {os.environ['KERAS_BACKEND']!r}"
        )


def main(argv=None):
    choose_backend()
    arguments = parse(argv)
    import keras

    from benchmarks.learning import mixers, report, tasks
    from benchmarks.learning.records import Records

    for name in arguments.mixers:
        mixers.check(name)
    keras.config.set_dtype_policy(arguments.dtype)
    task = _changed(tasks.make(arguments.task, arguments.size), arguments)
    records = Records(arguments.out, task.name)
    deadline = time.perf_counter() + 60 * (arguments.minutes or float("inf"))
    status = COMPLETE
    for name in arguments.mixers:
        try:
            complete = _train(task, name, records, arguments, deadline)
        except RuntimeError as error:  # such as too little memory; other mixers may fit
            print(f"{name}: {str(error)[:500]}", file=sys.stderr, flush=True)
            status = FAILED
        else:
            status = status if complete else status or NO_TIME
    report.show(task, records, arguments.out)
    return status


def _changed(task, arguments):
    changes = {name: value for name in ("width", "steps") if (value := getattr(arguments, name))}
    if arguments.width:
        changes["heads"] = max(1, arguments.width // 64)
    if arguments.rates:
        changes["rates"] = tuple(float(f"{float(x):.6g}") for x in arguments.rates)  # as in files
    return dataclasses.replace(task, **changes)


def _train(task, mixer, records, arguments, deadline):
    """Trains the missing replicates of a mixer; returns whether none is missing at the end."""
    from benchmarks.learning import environment, schedule
    from benchmarks.learning.train import Trainer

    settings = {
        "task": task.name,
        "size": arguments.size,
        "mixer": mixer,
        "width": task.width,
        "steps": task.steps,
        "batch": task.train.shape[0],
        "dtype": arguments.dtype,
    }
    trainer = None
    while replicates := schedule.missing(records, settings, task.rates, arguments.seeds):
        if time.perf_counter() + _expected_seconds(records, task, mixer) > deadline:
            print(
                f"{mixer}: {len(replicates)} replicates are not trained, as no time is left",
                flush=True,
            )
            return False
        trainer = trainer or Trainer(task, mixer, arguments.at_once)
        outcomes = trainer.run(replicates[: arguments.at_once])
        same = settings | trainer.describe() | environment.describe()
        rows = [
            {**same, "rate": x.replicate.rate, "seed": x.replicate.seed, **x.values}
            for x in outcomes
        ]
        records.add(rows)
        for row in rows:
            _print(task, row)
    return True


def _expected_seconds(records, task, mixer):
    """Seconds that the last replicates took, of this mixer or else of the last one."""
    rows = records.find({"steps": task.steps, "width": task.width})
    last = [row for row in rows if row["mixer"] == mixer] or rows[-1:]
    return max((float(row["seconds"]) for row in last), default=0.0)


def _print(task, row):
    tested = ", ".join(f"{name} {row[f'{task.metric} {name}']:.4g}" for name in task.tests)
    print(
        f"{row['mixer']}, rate {row['rate']:g}, seed {row['seed']}: {task.metric} {tested}; "
        f"validation loss {row['valid loss']:.4g}; {row['seconds']:.0f} s in all",
        flush=True,
    )


if __name__ == "__main__":
    sys.exit(main())
