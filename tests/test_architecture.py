"""Which part of the package may import which: the table is the architecture, from the bottom up."""

import ast
import re
import sys
import tomllib

import pytest
from scripts import ROOT

# Modules and folders, without `keras_hla.`, and what each imports. A row imports rows above it
# alone, so that there is no circle. A file belongs to the longest name that fits it.
MAY_IMPORT = {
    # Tensors, and what holds everywhere.
    "backend": "",
    "checks": "",
    "types": "",
    "precision": "",
    "masking": "backend",
    "grouping": "backend",
    # What an operator is: a chain of passes of the primitive.
    "scan": "backend",
    "distributed_scan": "scan",
    "operators": "checks scan types",
    # Kernels: how any are launched, those of the operators, those of the stages, and all of a layer
    # as one function.
    "kernels.launching": "backend",
    "kernels.device": "",
    "kernels.passes": "backend",
    "kernels.operator": "backend kernels.launching kernels.device kernels.passes",
    "kernels.stages": "kernels.launching kernels.device",
    "kernels.token": "kernels.launching kernels.passes kernels.stages",
    "kernels.fusion": "backend kernels.launching kernels.operator kernels.passes kernels.stages",
    # What a layer does before and after its operator: portable, or by kernels.
    "stages": "backend masking precision kernels.stages",
    # From public tensors to outputs and states.
    "forms": "backend distributed_scan grouping scan",
    "inputs": "backend checks grouping masking precision scan",
    "evaluate": "forms grouping kernels.operator",
    # Which implementation is taken, and the proof of kernels on a GPU that is not known.
    "kernels.small_cases": "evaluate inputs kernels.stages precision stages",
    "kernels.proof": "backend kernels.device kernels.small_cases operators stages",
    "kernels": "backend checks operators kernels.device kernels.passes kernels.proof kernels.token "
    "types",
    # What users call.
    "layers": "backend checks evaluate inputs kernels kernels.fusion kernels.token masking "
    "operators precision scan stages types",
    "distribution": "layers types",
    "torch_module": "types",
    "ops": "backend checks evaluate forms grouping inputs kernels operators types",
    "streaming": "backend checks layers types",
    "export": "backend checks streaming types",
    "hub": "checks layers operators streaming types",
    "": "distribution kernels layers operators ops streaming export",  # `keras_hla` itself
}

# Other packages than Keras and NumPy, and the rows that import them. All else is written in Keras'
# own operations.
OTHERS = {
    "tensorflow": "backend export",  # whose files are made by TensorFlow
    "jax": "backend kernels.device kernels.launching",
    "torch": "backend kernels.device kernels.fusion kernels.launching torch_module",
    "triton": "kernels.operator kernels.stages kernels.token",
    "jax_triton": "kernels.launching",
    "keras_hub": "hub",
    "tf2onnx": "export",
    # What Keras has no public name for: the device, and the cells that draw before a loop.
    "keras.src": "backend layers",
}
FILES = {
    ".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__"): path
    for path in sorted((ROOT / "keras_hla").rglob("*.py"))
}


def imports(source):
    """The names of the modules that a module imports, and whether outside of functions."""
    tree = ast.parse(source)
    late = {
        node
        for function in ast.walk(tree)
        if isinstance(function, ast.FunctionDef | ast.AsyncFunctionDef | ast.Lambda)
        for node in ast.walk(function)
    }
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from ((name.name, node not in late) for name in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert not node.level, "imports are absolute"
            for name in node.names:
                module = f"{node.module}.{name.name}"
                yield module if module in FILES else node.module, node not in late


def row_of(module, table=MAY_IMPORT):
    """The longest key of a table that a module is, or is inside of."""
    name = module.removeprefix("keras_hla").removeprefix(".")
    fitting = [row for row in table if f"{name}.".startswith(f"{row}.")]
    return max(fitting, key=len, default="")


def refused(module, source):
    """The imports of a module that the tables do not allow."""
    row = row_of(module)
    for imported, _ in imports(source):
        if imported.partition(".")[0] == "keras_hla":
            other = row_of(imported)
            if other not in (row, *MAY_IMPORT[row].split()):
                yield imported
            continue
        top = "keras.src" if imported.startswith("keras.src") else imported.partition(".")[0]
        if top in {"keras", "numpy", *sys.stdlib_module_names}:
            continue
        if row not in OTHERS.get(top, "").split():
            yield imported


def test_a_row_imports_rows_above_it():
    rows = list(MAY_IMPORT)
    assert {row_of(module) for module in FILES} == set(rows), "a row is for files that there are"
    for i, row in enumerate(rows):
        for other in MAY_IMPORT[row].split():
            assert other in rows[:i], f"`{row}` may not import `{other}`, which is not above it"


@pytest.mark.parametrize("module", FILES)
def test_a_module_imports_what_its_row_may(module):
    path = FILES[module]
    known = row_of(module) or module == "keras_hla"
    assert known, f"{path.relative_to(ROOT)} belongs to no row of MAY_IMPORT: add one"
    wrong = [*refused(module, path.read_text(encoding="utf-8"))]
    assert not wrong, f"{path.relative_to(ROOT)} imports {wrong}: see MAY_IMPORT and OTHERS"


def test_wrong_imports_are_found():
    source = (
        "import torch.nn\nfrom keras_hla import layers, precision\nimport math\n"
        "def f():\n    from keras_hla.kernels.operator import chain\n    import yaml\n"
    )
    wrong = ["torch.nn", "keras_hla.layers", "yaml", "keras_hla.kernels.operator.chain"]
    assert sorted(refused("keras_hla.stages.gate", source)) == sorted(wrong)


def test_no_backend_is_imported_before_it_is_used():
    """What `import keras_hla` imports, as far as functions do not, is Keras and NumPy."""
    met, to_do = set(), ["keras_hla"]
    while to_do:
        module = to_do.pop()
        for imported, early in imports(FILES[module].read_text(encoding="utf-8")):
            if early and imported in FILES and imported not in met:
                met.add(imported)
                to_do.append(imported)
            elif early and imported not in FILES:
                name = imported.partition(".")[0]
                assert name not in OTHERS, f"{module} imports `{imported}` outside of a function"


def test_what_is_installed_is_what_there_is():
    with open(ROOT / "pyproject.toml", "rb") as file:
        packages = tomllib.load(file)["tool"]["setuptools"]["packages"]
    folders = [
        ".".join(path.parent.relative_to(ROOT).parts)
        for path in FILES.values()
        if path.name == "__init__.py"
    ]
    assert packages == sorted(folders)


PAGES = [path for path in (*ROOT.glob("*.md"), *ROOT.glob("docs/*.md")) if path.stem != "CHANGELOG"]


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_documentation_names_files_that_there_are(page):
    folders = "keras_hla|tests|benchmarks|examples|docs"
    for name in re.findall(rf"`((?:{folders})/[\w/.]*)`", page.read_text(encoding="utf-8")):
        assert (ROOT / name).exists(), f"{page.relative_to(ROOT)} names `{name}`"
