"""The plot of the README: what second order, first order and their peers learn.

    python -m benchmarks.learning.summary docs/evidence

reads the records in the folder, and saves `summary.png` there.
"""

from pathlib import Path
import sys
from typing import NamedTuple

from benchmarks.learning.records import Records
from benchmarks.learning.report import Line, lines, spread


class Panel(NamedTuple):
    """How a task is shown: its mixers, by their names in the records and in the plot."""

    metric: str
    title: str
    label: str
    mixers: dict


PANELS = {
    "language": Panel(
        "bits",
        "language: bits per byte",
        "bytes of context, trained at 512",
        {
            "hla2+rope+decay+conv": "hla2",
            "linear+rope+decay+conv/hla2+rope+decay+conv": "alternating linear and hla2",
            "linear+rope+decay+conv": "linear",
            "softmax+conv": "softmax attention",
        },
    ),
    "mqar": Panel(
        "accuracy",
        "recall: accuracy",
        "tokens / pairs, trained up to 256 / 64",
        {
            "hla2+conv": "hla2",
            "linear+conv/hla2+conv": "alternating linear and hla2",
            "linear+conv": "linear",
            "delta": "gated delta rule",
            "softmax+conv": "softmax attention",
        },
    ),
    "series": Panel(
        "error",
        "ragged series: error",
        "places, trained up to 96",
        {
            "hla2+rope+decay+conv": "hla2",
            "linear+decay+conv": "linear",
            "softmax+conv": "softmax attention",
            "gru": "GRU",
        },
    ),
}
COLORS = {
    name: f"C{n}"
    for n, name in enumerate(
        dict.fromkeys(name for panel in PANELS.values() for name in panel.mixers.values())
    )
}


def save(folder):
    """Saves the plot, and returns its path."""
    import matplotlib

    matplotlib.use("agg")
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(1, len(PANELS), figsize=(14, 4), layout="constrained")
    for ax, (task, panel) in zip(axes, PANELS.items(), strict=True):
        found: dict[str, Line] = {}
        for line in lines(Records(folder, task).rows, panel.metric):
            found.setdefault(line.mixer, line)  # which is that of the longest training
        for mixer, name in panel.mixers.items():
            tests = found[mixer].tests
            mean, deviation = zip(*map(spread, tests.values()), strict=True)
            ax.errorbar(
                list(tests), mean, deviation, label=name, color=COLORS[name], marker="o", capsize=3
            )
        ax.set_title(panel.title)
        ax.set_xlabel(panel.label)
        if panel.metric == "error":
            ax.set_yscale("log")
        ax.legend(fontsize="small")
    path = Path(folder) / "summary.png"
    figure.savefig(path, dpi=100)
    plt.close(figure)
    return path


if __name__ == "__main__":
    print(save(sys.argv[1]))
