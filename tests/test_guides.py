"""The guides run, in a small size, and become notebooks."""

import ast
import json

import keras
import pytest
from scripts import ROOT, run_python

from guides.cells import cells

# By guide: the constants that a small run replaces, and what it prints.
GUIDES = {
    "language_model": (
        {
            "WIDTH": 16,
            "NUM_HEADS": 2,
            "LENGTH": 16,
            "STEPS": 4,
            "EVALUATED_LENGTHS": (16, 32),
            "EVALUATED_TOKENS": 512,
        },
        ["32 bytes: ", "class Parser", "at any length of the text", "largest difference"],
    ),
    "time_series": (
        {
            "WIDTH": 8,
            "KEY_DIM": 4,
            "LONGEST": 16,
            "NUM_SERIES": 64,
            "NUM_TEST_SERIES": 32,
            "EPOCHS": 1,
        },
        ["HLA: ", "GRU: ", "at up to 64 readings", "the answers differ by"],
    ),
    "streaming_service": (
        {
            "WIDTH": 8,
            "LENGTH": 16,
            "NUM_SEQUENCES": 64,
            "EPOCHS": 1,
            "HISTORIES": (10, 100),
        },
        ["B stop ", "after    100 events", "the exported model scores as"],
    ),
}


def source_of(guide):
    return (ROOT / "guides" / f"{guide}.py").read_text(encoding="utf-8")


def with_constants(source, constants):
    """The source, with other values for constants that it assigns."""
    tree, left = ast.parse(source), dict(constants)
    for statement in tree.body:
        if (
            isinstance(statement, ast.Assign)
            and (name := ast.unparse(statement.targets[0])) in left
        ):
            statement.value = ast.parse(repr(left.pop(name)), mode="eval").body
    assert not left
    return ast.unparse(tree)


@pytest.mark.parametrize("guide", GUIDES)
def test_runs(guide, tmp_path):
    constants, shown = GUIDES[guide]
    script = tmp_path / "guide.py"
    script.write_text(with_constants(source_of(guide), constants), encoding="utf-8")
    output = run_python(script, backend=keras.config.backend(), folder=tmp_path)
    for text in shown:
        assert text in output


def test_every_guide_is_here():
    scripts = {path.stem for path in (ROOT / "guides").glob("*.py")}
    assert scripts - {"__init__", "cells"} == set(GUIDES)


@pytest.mark.parametrize("guide", GUIDES)
def test_notebook(guide, tmp_path):
    output = tmp_path / "guide.ipynb"
    run_python("-m", "guides.cells", f"guides/{guide}.py", output)
    notebook = json.loads(output.read_text(encoding="utf-8"))
    assert (notebook["nbformat"], notebook["nbformat_minor"]) == (4, 5)
    assert len({cell["id"] for cell in notebook["cells"]}) == len(notebook["cells"])
    fields = {"cell_type", "id", "metadata", "source"}
    markdown = [cell for cell in notebook["cells"] if cell["cell_type"] == "markdown"]
    code = [cell for cell in notebook["cells"] if cell["cell_type"] == "code"]
    assert all(set(cell) == fields for cell in markdown)
    assert all(set(cell) == fields | {"execution_count", "outputs"} for cell in code)
    assert notebook["cells"][0]["source"][0].startswith("# ")

    # All that the script does, the cells do.
    found = ast.parse("\n".join("".join(cell["source"]) for cell in code))
    script = ast.parse(source_of(guide))
    script.body = [statement for statement in script.body if not is_text(statement)]
    assert ast.dump(found) == ast.dump(script)


def is_text(statement):
    return isinstance(statement, ast.Expr) and isinstance(statement.value, ast.Constant)


def test_cells():
    source = '''"""# Title

Text.
"""

import os  # a comment

"""
## Part
- one
  more
"""

# Before.
text = """
no cell
"""


def function():
    """No cell."""
    """Nor this."""


"no cell"
f"""{text} is no cell"""
r"""
$\\alpha$
"""
"""A second one."""
'''
    assert cells(source) == [
        ("markdown", "# Title\n\nText."),
        ("code", "import os  # a comment"),
        ("markdown", "## Part\n- one\n  more"),
        ("code", source[source.index("# Before") : source.index('r"""')].strip()),
        ("markdown", "$\\alpha$"),
        ("markdown", "A second one."),
    ]
    assert cells("") == []
