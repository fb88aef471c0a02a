"""Command-line arguments that the benchmarks share."""

import argparse


def parser(command, description):
    """A parser whose help keeps the line breaks of the description."""
    return argparse.ArgumentParser(
        prog=f"python -m {command}",
        description=description,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )


def names(text):
    return [name for name in text.split(",") if name]
