"""A guide as a notebook: `python -m guides.cells guides/language_model.py language_model.ipynb`.

A guide is a plain script. Its docstring is the title, each triple-quoted string that stands as a
statement of its own at the top level is Markdown, and what lies between them is code.
"""

import ast
import inspect
import json
from pathlib import Path
import sys


def cells(source: str) -> list[tuple[str, str]]:
    """Splits the source of a guide into its cells.

    Args:
        source: The text of the script.

    Returns:
        The cells in order, pairs of `"markdown"` or `"code"` and the text. The text of a Markdown
        cell is without quotes and common indentation, that of a code cell is as in the script.
    """
    lines = source.splitlines()
    found, end = [], 0
    for statement in ast.parse(source).body:
        markdown = _markdown(source, statement)
        if markdown is not None:
            found += [("code", _join(lines[end : statement.lineno - 1])), ("markdown", markdown)]
            end = statement.end_lineno or end
    found.append(("code", _join(lines[end:])))
    return [(kind, text) for kind, text in found if text]


def _markdown(source: str, statement: ast.stmt) -> str | None:
    """The text of a triple-quoted string that stands alone, or `None`."""
    if not (isinstance(statement, ast.Expr) and isinstance(statement.value, ast.Constant)):
        return None
    text = statement.value.value
    written = ast.get_source_segment(source, statement) or ""
    if isinstance(text, str) and written.lstrip("rR").startswith(('"""', "'''")):
        return inspect.cleandoc(text)
    return None


def _join(lines: list[str]) -> str:
    return "\n".join(lines).strip("\n")


def notebook(source: str) -> dict[str, object]:
    """Returns a guide as a notebook, in version 4.5 of the format, without outputs."""
    only_code: dict[str, object] = {"execution_count": None, "outputs": []}
    return {
        "cells": [
            {
                "cell_type": kind,
                "id": f"cell-{n}",
                "metadata": {},
                "source": text.splitlines(keepends=True),
                **(only_code if kind == "code" else {}),
            }
            for n, (kind, text) in enumerate(cells(source))
        ],
        "metadata": {
            "kernelspec": {"display_name": "Python 3", "language": "python", "name": "python3"},
            "language_info": {"name": "python"},
        },
        "nbformat": 4,
        "nbformat_minor": 5,
    }


if __name__ == "__main__":
    if len(sys.argv) != 3:
        sys.exit("usage: python -m guides.cells SCRIPT.py NOTEBOOK.ipynb")
    script, output = map(Path, sys.argv[1:])
    content = notebook(script.read_text(encoding="utf-8"))
    output.write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")
