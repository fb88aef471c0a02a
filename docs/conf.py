"""The documentation site: pages, guides and docstrings, in HTML that needs no network."""

from pathlib import Path
import sys
import tomllib

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT / "docs" / "_extensions"))

project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]["name"]

extensions = ["myst_parser", "api", "guides", "links", "mathml"]
exclude_patterns = ["_build", "evidence/*.md"]  # records, not pages
myst_enable_extensions = ["colon_fence", "deflist", "dollarmath"]
myst_heading_anchors = 4
highlight_language = "text"

# A reference to a name of this package must resolve. Names of others are not looked up.
nitpicky = True
nitpick_ignore_regex = [("py:.*", r"(?!keras_hla).*")]
python_maximum_signature_line_length = 80
python_use_unqualified_type_names = True
toc_object_entries_show_parents = "hide"

html_theme = "furo"
html_title = "keras_hla"
html_static_path = ["_static"]
html_css_files = ["style.css"]
html_copy_source = False
html_show_copyright = False
html_show_sphinx = False
