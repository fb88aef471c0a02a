"""What the commands of the benchmarks have in common."""

import argparse


def parser(command, description):
    """A parser whose help shows a description as it is written."""
    return argparse.ArgumentParser(
        prog=f"python -m {command}",
        description=description,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )


def names(text):
    return [name for name in text.split(",") if name]
