"""The training step of a layer on a CPU, drawn from the table in docs/speed.md.

python plot_training_step.py --output training_step.svg
"""

import argparse
from pathlib import Path

import matplotlib as mpl

mpl.use("Agg")  # A file, and no window.
from matplotlib import pyplot as plt

SPEED = Path(__file__).parents[1] / "docs" / "speed.md"
HEADER = "| backend | tokens | `HLA`, plain | `MultiHeadAttention`, causal | `GRU` |"
LAYERS = {"HLA, plain": "#0969da", "MultiHeadAttention, causal": "#cf222e", "GRU": "#8c564b"}


def read_table(page):
    """The rows below the header: backend, tokens, and milliseconds of each layer."""
    lines = page.read_text(encoding="utf-8").splitlines()
    backend, rows = None, []
    for line in lines[lines.index(HEADER) + 2 :]:
        if not line.startswith("|"):
            return rows
        name, *cells = (cell.strip() for cell in line.strip("|").split("|"))
        backend = name or backend
        # A cell is a time, and may go on with the memory.
        rows.append((backend, *(float(cell.split()[0].replace(",", "")) for cell in cells)))
    return rows


def main():
    parser = argparse.ArgumentParser(
        description="Draw the training step of HLA, attention and GRU on a CPU.",
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    parser.add_argument("--output", default="training_step.svg", help="SVG or PNG file to write")
    output = parser.parse_args().output
    mpl.rcParams["svg.hashsalt"] = "training step"  # The same file each time.
    rows = read_table(SPEED)
    backends = dict.fromkeys(row[0] for row in rows)
    figure, axes = plt.subplots(
        1, len(backends), figsize=(11, 3.4), sharey=True, layout="constrained"
    )
    for axis, backend in zip(axes, backends, strict=True):
        tokens, *times = zip(*(row[1:] for row in rows if row[0] == backend), strict=True)
        for (layer, colour), milliseconds in zip(LAYERS.items(), times, strict=True):
            axis.loglog(tokens, milliseconds, "o-", color=colour, label=layer)
        axis.set(title=backend, xlabel="tokens")
        axis.set_xticks(tokens, [f"{n:,.0f}" for n in tokens], minor=False)
        axis.set_xticks([], minor=True)
        axis.grid(axis="y", alpha=0.3)
    axes[0].set_ylabel("ms per training step")
    axes[1].legend(loc="upper left")
    figure.savefig(output, metadata={"Date": None} if output.endswith(".svg") else None)
    print(f"Wrote {output}")


if __name__ == "__main__":
    main()
