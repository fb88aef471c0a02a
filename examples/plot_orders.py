"""How a token reads the past in first and in second order, as a diagram.

    python plot_orders.py --output orders.svg

Both panels show the weight of one value in one output. In first order it is the
match of the query with the key beside the value. In second order it is a sum over
the keys that both tokens can see: the tokens are compared by what they attend to.
"""

import argparse

import matplotlib as mpl

mpl.use("Agg")  # A file, and no window.
from matplotlib import pyplot as plt

TOKENS, OUTPUT, VALUE = 6, 6, 4
PALE, DARK, STRONG = "#d0d7de", "#57606a", "#0969da"


def nodes(axis, *rows):
    """Circles at the tokens of each row, `(letter, height, tokens)`."""
    circle = {"boxstyle": "circle,pad=0.25", "facecolor": "white", "edgecolor": DARK}
    for letter, height, tokens in rows:
        for token in tokens:
            label = f"${letter}_{token}$"
            axis.text(token, height, label, ha="center", va="center", fontsize=12, bbox=circle)


def edges(axis, pairs, top, bottom, strong):
    """Lines from height to height; those for which `strong` holds are drawn over the rest."""
    for begin, end in sorted(pairs, key=lambda pair: strong(*pair)):
        colour, width = (STRONG, 2.2) if strong(begin, end) else (PALE, 1)
        axis.plot((begin, end), (top, bottom), color=colour, linewidth=width, zorder=0)


def first_order(axis):
    past = range(1, OUTPUT + 1)
    edges(axis, [(OUTPUT, j) for j in past], 3, 1.5, lambda t, j: j == VALUE)
    edges(axis, [(j, j) for j in past], 1.5, 0, lambda j, _: j == VALUE)
    nodes(axis, ("q", 3, [OUTPUT]), ("k", 1.5, past), ("v", 0, past))
    axis.set_title(
        f"First order\nweight of $v_{VALUE}$ in $o_{OUTPUT}$:  $q_{OUTPUT}^\\top k_{VALUE}$"
    )


def second_order(axis):
    past = range(1, OUTPUT + 1)
    pairs = [(i, j) for j in past for i in past if i <= j]
    edges(axis, [(OUTPUT, i) for i in past], 3, 2, lambda t, i: i <= VALUE)
    edges(axis, pairs, 2, 1, lambda i, j: j == VALUE)
    edges(axis, [(j, j) for j in past], 1, 0, lambda j, _: j == VALUE)
    nodes(axis, ("q", 3, [OUTPUT]), ("k", 2, past), ("q", 1, past), ("v", 0, past))
    axis.set_title(
        f"Second order\nweight of $v_{VALUE}$ in $o_{OUTPUT}$:  "
        f"$\\sum_{{i \\leq {VALUE}}} (q_{OUTPUT}^\\top k_i)(k_i^\\top q_{VALUE})$"
    )


def main():
    parser = argparse.ArgumentParser(
        description="Draw how first and second order read the past.",
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    parser.add_argument("--output", default="orders.svg", help="SVG or PNG file to write")
    output = parser.parse_args().output
    mpl.rcParams["svg.hashsalt"] = "orders"  # The same file each time.
    figure, axes = plt.subplots(1, 2, figsize=(10, 4.2), layout="constrained")
    for axis, panel in zip(axes, (first_order, second_order), strict=True):
        panel(axis)
        axis.set(xlim=(0.5, TOKENS + 0.5), ylim=(-0.4, 3.4))
        axis.axis("off")
    figure.savefig(output, metadata={"Date": None} if output.endswith(".svg") else None)
    print(f"Wrote {output}")


if __name__ == "__main__":
    main()
