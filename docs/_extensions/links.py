"""Links that the pages have without markup of their own, so that they read well elsewhere, too.

Inline code that names a public object of the package leads to its reference. Links to files outside
of `docs/` that are pages of the site lead there.
"""

import re

from docutils import nodes
from sphinx import addnodes
from sphinx.transforms.post_transforms import SphinxPostTransform
from sphinx.util import logging
from sphinx.util.nodes import make_refnode

logger = logging.getLogger(__name__)

# A name, or the call of one: `keras_hla.layers.HLA`, `HLA(causal=False)`.
_NAME = re.compile(r"(\w+(?:\.\w+)*)(?:\(.*\))?", re.DOTALL)
_OUTSIDE = {
    r"\]\(\.\./README\.md": "](index.md",
    r"\]\(\.\./(CHANGELOG|CONTRIBUTING)\.md": lambda match: f"]({match[1].lower()}.md",
    r"\]\(\.\./guides/(\w+)\.py": r"](guides/\1.md",
}


class LinkNames(SphinxPostTransform):
    """Links the names of the API reference wherever they stand in inline code."""

    default_priority = 500

    def run(self, **kwargs):
        objects = self.env.domains.python_domain.objects
        names = _short_names(objects)
        for literal in list(self.document.findall(nodes.literal)):
            match = _NAME.fullmatch(literal.astext())
            if match is None or _is_inside(literal, nodes.reference, nodes.title, nodes.term):
                continue
            name = match[1]
            if name in names:
                self._link(literal, names[name], objects[names[name]])
            elif name.startswith("keras_hla."):
                logger.warning("No public name: %s", name, location=literal)

    def _link(self, literal, name, target):
        page = self.env.current_document.docname
        around = _ancestor(literal, addnodes.desc)
        if around is not None and target.node_id in around[0]["ids"]:
            return  # in the description of the very object
        link = make_refnode(
            self.app.builder, page, target.docname, target.node_id, literal.deepcopy(), name
        )
        literal.replace_self(link)


def _short_names(objects):
    """What each name stands for: full names, and their ends that may stand alone.

    A single word stands for a class or function alone, and where it looks like one of the package:
    `HLACell` and `streaming_model` do, `get` and `initial_state` (an argument) do not.
    """
    names = {}
    for full in sorted(objects, key=lambda name: name.count("."), reverse=True):
        words = full.split(".")
        for n in range(1, len(words)):
            end = ".".join(words[n:])
            is_telling = objects[full].objtype in {"class", "function"} and re.search("[A-Z_]", end)
            if "." in end or is_telling:
                names[end] = full  # The shortest full name comes last, and stays.
    return names | {full: full for full in objects if "." in full}


def _ancestor(node, *kinds):
    while node is not None and not isinstance(node, kinds):
        node = node.parent
    return node


def _is_inside(node, *kinds):
    return _ancestor(node, *kinds) is not None


def link_to_pages(app, name, source):
    """Turns links to files that are pages here into links to these pages."""
    for pattern, replacement in _OUTSIDE.items():
        source[0] = re.sub(pattern, replacement, source[0])


def setup(app):
    app.connect("source-read", link_to_pages)
    app.add_post_transform(LinkNames)
    return {"parallel_read_safe": True, "parallel_write_safe": True}
