"""What the documentation shows runs."""

import doctest
import inspect
import os
import re

import keras
import pytest
from scripts import ROOT, run_python

import keras_hla
from keras_hla import layers, operators, ops

PUBLIC = [
    layers.HLA,
    layers.HLACell,
    operators.get,
    operators.register,
    ops.attention_step,
    ops.attention_weights,
    ops.causal_linear_attention,
    ops.combine,
    ops.higher_order_attention,
    ops.summarize,
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


def test_readme_examples(tmp_path):
    blocks = re.findall(r"```python\n(.*?)```", (ROOT / "README.md").read_text(), re.DOTALL)
    assert len(blocks) >= 3
    os.symlink(ROOT / "keras_hla", tmp_path / "keras_hla")
    code = f"import os\nos.chdir({str(tmp_path)!r})\n" + "\n".join(blocks)
    run_python("-c", code, backend=keras.config.backend())
