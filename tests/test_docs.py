"""What the documentation shows runs."""

import doctest
import inspect
import re

import keras
import pytest
from scripts import ROOT, run_python

import keras_hla
from keras_hla import hub, layers, operators, ops, streaming

PUBLIC = [
    keras_hla.generate,
    keras_hla.streaming_model,
    hub.HLABackbone,
    hub.HLACausalLM,
    hub.HLACausalLMPreprocessor,
    hub.HLATokenizer,
    layers.HLA,
    layers.HLACell,
    layers.HLADecoderBlock,
    operators.get,
    operators.register,
    ops.attention_step,
    ops.attention_weights,
    ops.causal_linear_attention,
    ops.combine,
    ops.higher_order_attention,
    ops.summarize,
    streaming.Scheduler,
]


@pytest.mark.parametrize("documented", PUBLIC, ids=lambda x: x.__name__)
def test_docstring_examples(documented):
    names = {"keras": keras, "keras_hla": keras_hla}
    finder = doctest.DocTestFinder(recurse=False)
    (test,) = finder.find(documented, documented.__name__, globs=names)
    assert test.examples
    results = doctest.DocTestRunner().run(test)
    assert results.failed == 0


@pytest.mark.parametrize("documented", PUBLIC, ids=lambda x: x.__name__)
def test_docstrings_name_every_argument(documented):
    arguments = [
        name
        for name, parameter in inspect.signature(documented).parameters.items()
        if parameter.kind is not parameter.VAR_KEYWORD
    ]
    # The layer's own arguments; those of every Keras layer are under **kwargs.
    for name in set(arguments) - {"name", "trainable", "dtype"}:
        assert re.search(rf"^ *{name}: ", documented.__doc__, re.MULTILINE), name


def blocks(page):
    return re.findall(r"```python\n(.*?)```", page.read_text(encoding="utf-8"), re.DOTALL)


def test_readme_examples(tmp_path):
    code = blocks(ROOT / "README.md")
    assert len(code) >= 3
    run_in(tmp_path, ["\n".join(code)], optimize=True)


def test_pages(tmp_path):
    """The blocks of each page one after the other, each page for itself."""
    pages = sorted((ROOT / "docs").glob("*.md"))  # numerics.md, which makes JAX use float64, last
    code = ["\n".join(blocks(page)) for page in pages]
    without_code = {page.stem for page, text in zip(pages, code, strict=True) if not text}
    assert without_code <= {"changelog", "contributing"}
    run_in(tmp_path, code)


def run_in(folder, programs, **options):
    """Runs programs in a folder, each with no names but its own."""
    for n, program in enumerate(programs):
        (folder / f"{n}.py").write_text(program, encoding="utf-8")
    code = (
        f"import os, sys\nos.chdir({str(folder)!r})\n"
        f"for n in range({len(programs)}):\n"
        "    exec(compile(open(f'{n}.py', encoding='utf-8').read(), f'{n}.py', 'exec'), {})\n"
    )
    run_python("-c", code, backend=keras.config.backend(), **options)
