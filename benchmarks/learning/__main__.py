"""Trains small models with HLA layers and their peers on standard tasks, under JAX.

    python -m benchmarks.learning --task mqar --mixers hla2+conv,linear+conv,softmax --out FOLDER

For each mixer some learning rates are tried with one seed; the one of the smallest validation loss
is trained with the other seeds. Each replicate is a row of FOLDER/TASK.csv, and what is there is
not trained again. At the end the table is printed and drawn. Mixers: an operator with options, as
in hla2+conv+decay (conv, rope, decay, multiscale, gate, qk_norm, ridge, unmasked),
linear+conv/hla2+conv layer by layer, softmax, softmax+conv, delta, delta+gate, gru.
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
    add("--mixers", type=names, default=names(MIXERS), help=f"default: {MIXERS}")
    add("--backend", choices=("jax",), default="jax", help="what is learned depends on none")
    add("--size", choices=SIZES, default="full", help="small is for two CPU cores")
    add("--width", type=int, help="features of the model; heads have 64")
    add("--steps", type=int, help="steps of training")
    add("--rates", type=names, help="learning rates to try")
    add("--seeds", type=int, default=5, help="of the best learning rate (default: 5)")
    add("--at-once", type=int, default=4, help="replicates trained side by side (default: 4)")
    add("--dtype", choices=("float32", "mixed_bfloat16"), default="float32")
    add("--minutes", type=float, help="start nothing that is expected to end later")
    add("--out", type=Path, default=Path("docs/evidence"), help="default: docs/evidence")
    arguments = command.parse_args(argv)
    for name in ("width", "steps", "seeds", "at_once"):
        value = getattr(arguments, name)
        if value is not None and value < 1:
            command.error(f"--{name.replace('_', '-')} must be positive, not {value}")
    return arguments


def choose_backend():
    """Before Keras is imported."""
    os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")
    if os.environ.setdefault("KERAS_BACKEND", "jax") != "jax":
        sys.exit(
            "The benchmark trains many models at once by JAX alone: the environment variable "
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
        except RuntimeError as error:  # of JAX, as where the memory is too small; others may fit
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
    """Trains what a mixer lacks; returns whether nothing does at the end."""
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
            print(f"{mixer}: no time left for {len(replicates)} replicates", flush=True)
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
    """What the replicates that are trained at once took, by this mixer or else by the last one."""
    rows = records.find({"steps": task.steps, "width": task.width})
    last = [row for row in rows if row["mixer"] == mixer] or rows[-1:]
    return max((float(row["seconds"]) for row in last), default=0.0)


def _print(task, row):
    tested = ", ".join(f"{name} {row[f'{task.metric} {name}']:.4g}" for name in task.tests)
    print(
        f"{row['mixer']}, rate {row['rate']:g}, seed {row['seed']}: {task.metric} {tested}; "
        f"validation loss {row['valid loss']:.4g}; together {row['seconds']:.0f} s",
        flush=True,
    )


if __name__ == "__main__":
    sys.exit(main())
