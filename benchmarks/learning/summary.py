"""The picture of the README: what second order, first order and their peers learn.

    python -m benchmarks.learning.summary docs/evidence

reads the records in the folder, and draws `summary.png` there.
"""

from pathlib import Path
import sys

from benchmarks.learning.records import Records
from benchmarks.learning.report import lines, spread

# Of each task the mixers that are shown: those of the records, and how they are called.
SHOWN = {
    "language": {
        "block_default": "hla2",
        "linear+rope+decay+conv": "linear",
        "softmax+conv": "softmax attention",
    },
    "mqar": {
        "hla2+conv": "hla2",
        "linear+conv/hla2+conv": "linear and hla2 in turn",
        "linear+conv": "linear",
        "delta": "gated delta rule",
        "softmax+conv": "softmax attention",
    },
    "series": {
        "hla2+decay+conv": "hla2",
        "linear+decay+conv": "linear",
        "softmax+conv": "softmax attention",
        "gru": "GRU",
    },
}
METRICS = {"language": "bits", "mqar": "accuracy", "series": "error"}
TITLES = {
    "language": ("language: bits a byte", "bytes of context, trained at 512"),
    "mqar": ("recall: accuracy", "tokens / pairs, trained up to 256 / 64"),
    "series": ("ragged series: error", "places, trained up to 96"),
}
COLORS = {
    name: f"C{n}"
    for n, name in enumerate(
        dict.fromkeys(name for mixers in SHOWN.values() for name in mixers.values())
    )
}


def save(folder):
    """Draws the picture, and returns its path."""
    import matplotlib

    matplotlib.use("agg")
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(1, len(SHOWN), figsize=(14, 4), layout="constrained")
    for ax, (task, mixers) in zip(axes, SHOWN.items(), strict=True):
        found = {x.mixer: x for x in lines(Records(folder, task).rows, METRICS[task])}
        for mixer, name in mixers.items():
            tests = found[mixer].tests
            mean, deviation = zip(*map(spread, tests.values()), strict=True)
            ax.errorbar(
                list(tests), mean, deviation, label=name, color=COLORS[name], marker="o", capsize=3
            )
        title, label = TITLES[task]
        ax.set_title(title)
        ax.set_xlabel(label)
        if task == "series":
            ax.set_yscale("log")
        ax.legend(fontsize="small")
    path = Path(folder) / "summary.png"
    figure.savefig(path, dpi=100)
    plt.close(figure)
    return path


if __name__ == "__main__":
    print(save(sys.argv[1]))
