"""The scripts of `guides/` as pages: their text is Markdown already, and their code is shown."""

from pathlib import Path
import runpy

from generated import write

INDEX = """# Guides

Each guide is a script that runs as it is, on every backend, and can be made a notebook.

"""


def page(cells):
    """A guide as Markdown, from pairs of `"markdown"` or `"code"` and the text."""
    blocks = [text if kind == "markdown" else f"```python\n{text}\n```" for kind, text in cells]
    return "\n\n".join(blocks).replace("](../docs/", "](../") + "\n"


def write_pages(app):
    """Writes the pages into the folder `guides` beside the others, before these are read."""
    scripts = Path(app.srcdir).parent / "guides"
    folder = Path(app.srcdir) / "guides"
    split = runpy.run_path(scripts / "cells.py")["cells"] if scripts.exists() else None
    names = []
    for script in sorted(scripts.glob("*.py")):
        cells = split(script.read_text(encoding="utf-8"))
        if cells[0][1].startswith("# "):  # as guides do, and `cells.py` does not
            names.append(script.stem)
            write(folder / f"{script.stem}.md", page(cells))
    write(folder / "index.md", INDEX + "\n".join(["```{toctree}", *names, "```"]) + "\n")


def setup(app):
    app.connect("builder-inited", write_pages)
    return {"parallel_read_safe": True, "parallel_write_safe": True}
