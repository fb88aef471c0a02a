"""How far the chunked form in float32 is from a serial recurrence in float64.

    python numerics.py --backend torch

Queries, keys and values are independent standard normal numbers, three heads of
them, one per decay, all in one call. The recurrences below are plain NumPy, in
float64, and see the very inputs of the package: what is measured is arithmetic,
not the rounding of inputs. Per window of positions: the root mean square of the
outputs, and that of the error divided by it.
"""

import argparse
import os

DECAYS = (1.0, 0.99, 1e-6)
WINDOWS = (1024, 8192, 65536)

parser = argparse.ArgumentParser(
    description="Measure the float32 error of the chunked form against the position.",
    formatter_class=argparse.ArgumentDefaultsHelpFormatter,
)
parser.add_argument("--backend", choices=("tensorflow", "jax", "torch"), default="tensorflow")
parser.add_argument("--length", type=int, default=WINDOWS[-1], help="number of tokens")
parser.add_argument("--dim", type=int, default=8, help="size of queries, keys and values")
arguments = parser.parse_args()
os.environ["KERAS_BACKEND"] = arguments.backend
os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")

import keras  # noqa: E402  # Keras reads the backend when it is imported.
import numpy as np  # noqa: E402

import keras_hla  # noqa: E402


def outer(row, column):
    return row[:, :, None] * column[:, None, :]


def read(matrix, vector):
    return (vector[:, None, :] @ matrix)[:, 0]


def hla2(tokens, a):
    S = F = 0.0
    for q, k, v in tokens:
        S = a * S + outer(k, k)
        F = a**2 * F + outer(read(S, q), v)
        yield read(F, q)


def ahla(tokens, a):
    P = E = 0.0
    for q, k, v in tokens:
        P = a * P + outer(k, v)
        E = a * E + outer(k, read(P, q))
        yield read(E, q)


def hla3(tokens, a):
    S = P = F = 0.0
    for q, k, v in tokens:
        S = a * S + outer(k, k)
        P = a * P + outer(k, v)
        F = a**3 * F + outer(read(S, q), read(P, q))
        yield read(F, q)


def outputs(recurrence, inputs, log_decay):
    """The outputs of both, `(length, heads, dim)`; heads have the decays `exp(log_decay)`."""
    chunked = keras_hla.ops.higher_order_attention(
        *(keras.ops.convert_to_tensor(x[None]) for x in inputs),
        operator=recurrence.__name__,
        log_decay=log_decay,
    )
    tokens = zip(*(x.astype("float64") for x in inputs), strict=True)
    decay = np.exp(log_decay.astype("float64"))[:, None, None]
    expected = np.stack(list(recurrence(tokens, decay)))
    return keras.ops.convert_to_numpy(chunked)[0].astype("float64"), expected


def root_mean_square(x):
    return np.sqrt(np.mean(x**2))


def report():
    length, dim = arguments.length, arguments.dim
    random = np.random.default_rng(0)
    inputs = random.standard_normal((3, length, len(DECAYS), dim)).astype("float32")
    log_decay = np.log(DECAYS).astype("float32")
    ends = [end for end in WINDOWS if end < length] + [length]
    windows = list(zip([0, *ends[:-1]], ends, strict=True))

    print(f"Chunked float32 on {arguments.backend} against serial float64, {length:,} tokens:")
    print("RMS of the outputs and relative RMS error, per window of positions")
    print(
        "           decay" + "".join(f"{f'{begin + 1:,} to {end:,}':>22}" for begin, end in windows)
    )
    for recurrence in (hla2, ahla, hla3):
        chunked, expected = outputs(recurrence, inputs, log_decay)
        for head, decay in enumerate(DECAYS):
            cells = []
            for begin, end in windows:
                size = root_mean_square(expected[begin:end, head])
                error = root_mean_square((chunked - expected)[begin:end, head]) / size
                cells.append(f"{size:12.1e}  {error:8.1e}")
            print(f"  {recurrence.__name__:6}{decay:10g}" + "".join(cells), flush=True)
        bad = np.count_nonzero(~np.isfinite(chunked))
        if bad:
            print(f"  {recurrence.__name__}: {bad:,} outputs of {chunked.size:,} ARE NOT FINITE")
        else:
            print(f"  {recurrence.__name__}: all {chunked.size:,} outputs are finite")


if __name__ == "__main__":
    report()
