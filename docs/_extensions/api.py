"""One page per public module, from its docstrings, which are Markdown in the style of Keras.

The source is read and not imported, so that the site needs neither Keras nor a backend.
"""

import inspect
from pathlib import Path
import re

from generated import write
import griffe
from sphinx.util import logging

logger = logging.getLogger(__name__)

# The line of a public module in the docstring of the package, which lists them. Their `__all__`
# lists what is public in them.
_MODULE = re.compile(r"^- `(\w+)`: ", re.MULTILINE)
# By these the layers of the package work together; they are not for users.
_INTERNAL = {
    *("denses", "drop", "finish", "make_dense", "mlp_size", "options_of", "project"),
    *("angles", "projected_sizes", "split_states", "starts_and_shard", "starts_of"),
    *("get_dropout_mask", "get_recurrent_dropout_mask"),
}
SECTIONS = {
    "Args": "Arguments",
    "Call arguments": "Call arguments",
    "Returns": "Returns",
    "Yields": "Yields",
    "Raises": "Raises",
    "Example": "Example",
    "Examples": "Examples",
    "Reference": "Reference",
    "References": "References",
}
_SECTION = re.compile(rf"^({'|'.join(SECTIONS)}):(?: (.+))?$", re.MULTILINE)
_ITEM = re.compile(r"^(\*{0,2}\w+(?:, \*{0,2}\w+)*): ", re.MULTILINE)
_DOCTEST = re.compile(r"(?:^>>> .*\n(?:.+(?:\n|\Z))*)+", re.MULTILINE)


def public_names(module):
    """The objects that a module exports, by name: functions, classes and constants."""
    for name in module.exports:
        found = _resolve(module, str(name))
        if not found.is_module and name != "__version__":
            yield str(name), found
        elif found.is_module and found.name not in _MODULE.findall(module.docstring.value):
            logger.warning("%s exports a module that is not public: %s", module.path, name)


def _resolve(module, name):
    """Follows the imports of a name to its definition.

    A function and its file may have one name. The import tells which of them is meant.
    """
    path = module.imports.get(name)
    if path in {None, f"{module.path}.{name}"}:
        return module[name]
    parent, _, name = path.rpartition(".")
    return _resolve(module.modules_collection[parent], name)


def shortest_names(modules):
    """The public name under which each object is described, by the path of its definition."""
    names = {}
    for module in modules:
        for name, found in public_names(module):
            public = f"{module.path}.{name}"
            names[found.path] = min(names.get(found.path, public), public, key=len)
    return names


def page(module, documented):
    """The page of a module. `documented` are the `shortest_names` of all objects."""
    text = [f"# {module.path}", _fence("py:module", module.path), module.docstring.value]
    for name, found in public_names(module):
        shortest = documented[found.path]
        is_here = shortest == f"{module.path}.{name}"
        body = _body(found, documented) if is_here else f"The same as {{py:obj}}`{shortest}`."
        text.append(_entry(found, name, body))
    return "\n\n".join(text) + "\n"


def _body(found, documented):
    if found.is_attribute:
        return _markdown(found.docstring.value) if found.docstring else ""
    if not found.docstring:
        logger.warning("A public name has no docstring: %s", found.path)
        return ""
    text = [_markdown(found.docstring.value)]
    if found.is_class:
        text += [
            _entry(member, member.name, _markdown(member.docstring.value))
            for member in _members(found, documented)
        ]
    return "\n\n".join(text)


def _members(cls, documented):
    """The documented methods and properties of a class, without those of its public bases."""
    for name, member in (cls.members | cls.inherited_members).items():
        target = member.final_target if member.is_alias else member
        is_inherited = target.parent.path != cls.path and target.parent.path in documented
        is_public = not name.startswith("_") and name not in _INTERNAL
        if target.docstring and is_public and not is_inherited:
            yield target


def _entry(found, name, body):
    """The directive of an object, around its description."""
    kind, options = _kind(found)
    if found.is_attribute and found.annotation:
        options += f":type: {found.annotation}\n"
    signature = name if found.is_attribute else _signature(found, name)
    return _fence(f"py:{kind}", signature, f"{options}\n{body}")


def _kind(found):
    """The name of the directive, and its options."""
    if found.is_class:
        return "class", ""
    is_member = found.parent.is_class
    if found.is_attribute and not is_member:
        return "data", f":value: {found.value}\n"
    if found.is_attribute:
        return ("property" if "property" in found.labels else "attribute"), ""
    options = "".join(f":{x}:\n" for x in ("classmethod", "staticmethod") if x in found.labels)
    return ("method" if is_member else "function"), options


def _signature(found, name):
    """The name and parameters as in the source, and the type that is returned."""
    if found.is_class:
        init = found.all_members.get("__init__")
        if init is None:
            return name
        found = init.final_target if init.is_alias else init
        signature = found.signature(name=name, return_type=False)
    else:
        signature = found.signature(name=name)
    is_bound = found.parent.is_class and "staticmethod" not in found.labels
    return re.sub(r"\((self|cls)(, |(?=\)))", "(", signature, count=1) if is_bound else signature


def _markdown(docstring):
    """A docstring with its sections as bold words, and their items as definitions."""
    before, *sections = _split(_SECTION, inspect.cleandoc(docstring))
    text = [before]
    for title, rest, body in sections:
        is_example = title in {"Example", "Examples"}
        text += [f"**{SECTIONS[title]}**", rest or ""]
        text.append(inspect.cleandoc(body) if is_example else _definitions(inspect.cleandoc(body)))
    return "\n\n".join(_DOCTEST.sub(_fenced_doctest, x.strip()) for x in text if x.strip())


def _split(pattern, text):
    """The text before the first match, and a tuple of groups and of the text after each match."""
    matches = list(pattern.finditer(text))
    starts = [match.start() for match in matches] + [len(text)]
    yield text[: starts[0]]
    for match, end in zip(matches, starts[1:], strict=True):
        yield (*match.groups(), text[match.end() : end])


def _definitions(text):
    before, *items = _split(_ITEM, text)
    blocks = [before.strip()]
    for names, body in items:
        term = ", ".join(f"`{name}`" for name in names.split(", "))
        first, *rest = inspect.cleandoc(body).splitlines()
        blocks.append("\n".join([term, f": {first}", *(f"  {line}" for line in rest)]))
    return "\n\n".join(blocks)


def _fenced_doctest(match):
    return f"```pycon\n{match[0].rstrip()}\n```\n"


def _fence(directive, argument, body=""):
    fence = ":" * (6 - 3 * (directive in {"py:method", "py:property", "py:attribute"}))
    return f"{fence}{{{directive}}} {argument}\n{body}\n{fence}"


def write_pages(app):
    """Writes the pages into the folder `api` beside the others, before these are read."""
    package = griffe.load("keras_hla", search_paths=[Path(app.srcdir).parent])
    modules = [package, *(package[name] for name in _MODULE.findall(package.docstring.value))]
    documented = shortest_names(modules)
    for module in modules:
        write(Path(app.srcdir) / "api" / f"{module.path}.md", page(module, documented))


def setup(app):
    app.connect("builder-inited", write_pages)
    return {"parallel_read_safe": True, "parallel_write_safe": True}
