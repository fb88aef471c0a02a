"""Plots the times: a row of bars for each case."""


def save_bars(rows, path, title):
    """Bars of all medians with their quartiles, one axes for each case."""
    import matplotlib

    matplotlib.use("agg")
    import matplotlib.pyplot as plt

    cases: dict[str, list] = {}
    for row in rows:
        if row.times:
            cases.setdefault(row.case, []).append(row)
    if not cases:
        return False
    counts = [len(case) for case in cases.values()]
    figure, axes = plt.subplots(
        len(cases),
        figsize=(9, 1.2 * len(cases) + 0.45 * sum(counts)),
        gridspec_kw={"height_ratios": counts},
        squeeze=False,
        layout="constrained",
    )
    for ax, (case, members) in zip(axes[:, 0], cases.items(), strict=True):
        _bars(ax, members)
        ax.set_title(case, loc="left", fontsize="medium")
    axes[-1, 0].set_xlabel("milliseconds (median; lines are quartiles)")
    figure.suptitle(title)
    figure.savefig(path, dpi=120)
    plt.close(figure)
    return True


def _bars(ax, rows):
    from matplotlib.ticker import LogLocator, NullLocator

    columns = list(dict.fromkeys(column for row in rows for column in row.times))
    height = 0.8 / len(columns)
    for n, column in enumerate(columns):
        places = [
            (place, row.times[column]) for place, row in enumerate(rows) if column in row.times
        ]
        medians = [times.median for _, times in places]
        spread = [
            [times.median - times.low for _, times in places],
            [times.high - times.median for _, times in places],
        ]
        y = [place + (n - (len(columns) - 1) / 2) * height for place, _ in places]
        ax.barh(y, medians, height, xerr=spread, label=column, error_kw={"linewidth": 1})
    ax.set_yticks(range(len(rows)), [row.name for row in rows])
    ax.invert_yaxis()
    ax.set_xscale("log")
    ax.xaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
    ax.xaxis.set_major_formatter("{x:g}")
    ax.xaxis.set_minor_locator(NullLocator())
    ax.legend(fontsize="small")
