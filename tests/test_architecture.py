"""The shape of the package: imports run one way, files stay short, and importing it is light."""

from __future__ import annotations

import ast
import subprocess
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path

import pytest

PACKAGE = Path(__file__).parent.parent / "structprune"
FILES = sorted(PACKAGE.rglob("*.py"))

# A file or folder imports only what stands above it; those of one line do not import each other. A file of a folder
# that has a place of its own stands there.
ORDER = (
    ("errors", "files", "hardware", "html"),
    ("checking",),
    ("extras", "distributed", "progress"),
    ("tracing",),
    ("offloading", "padding"),
    ("wrapping",),
    ("ops",),
    ("coupling",),
    ("importance",),
    ("surgery",),
    ("schema",),
    # The record that is applied, saved and shown; how one is made needs all that measures time, which writes ONNX files
    # that name the plans of their model.
    ("planning.plan",),
    ("inputs",),
    ("equations", "forwards"),
    ("export",),
    ("benchmarking",),
    ("latency",),
    ("planning", "optimizers"),
    ("depth",),
    ("dependency_graph",),
    ("recovery",),
    ("joint", "quantization"),
    ("api",),
    ("pruner", "folders"),
    ("training", "masks"),
    ("filling",),
    ("io", "reporting"),
    ("search",),
    ("integrations",),
    ("compat",),
    ("cli",),
    ("__main__",),
)
RANK = {name: rank for rank, names in enumerate(ORDER) for name in names}

MAX_LINES = 400
# Of the package alone: the command line needs it.
COMMANDS = ("typer",)
# The last two are always there, but importing them takes longer than all of structprune: they are imported when used.
HEAVY = (
    "accelerate", "ai_edge_litert", "executorch", "gguf", "ignite", "litert_torch",
    "lightning", "matplotlib", "onnx", "onnxruntime", "onnxscript", "openvino", "optuna",
    "pytorch_lightning", "tensorrt", "timm", "torchao", "torchvision", "transformers", "networkx", "scipy",
)  # fmt: skip
# Each is for one library, and importing it is using that.
FOR_ONE_LIBRARY = ("ignite", "lightning", "transformers")


def imported(source: str) -> Iterator[tuple[int, str]]:
    """Line and full name of each import of something of the package, also inside functions."""
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            names = ["." * node.level + (node.module or "")]
        else:
            continue
        for name in names:
            if name.startswith(".") or name.split(".")[0] == "structprune":
                yield node.lineno, name


def part_of(names: Sequence[str]) -> str:
    """What has the place in ORDER of a module of the package: itself, or the file or folder that it is in."""
    return ".".join(names[:2]) if ".".join(names[:2]) in RANK else names[0]


def faults(part: str, source: str) -> list[str]:
    """What is wrong with the imports of a file; `part` is the file or folder that it belongs to."""
    found = []
    for line, name in imported(source):
        if name.startswith("."):
            found.append(f"line {line}: relative import {name}; write it out")
        elif name == "structprune":
            found.append(f"line {line}: imports the package's own __init__; import the module that defines the name")
        elif (other := part_of(name.split(".")[1:])) not in RANK:
            found.append(f"line {line}: {other} has no place in ORDER")
        elif other != part and RANK[other] >= RANK[part]:
            found.append(f"line {line}: {part} imports {other}, which does not stand above it")
    return found


# The package's own __init__ is the front door and gathers everything.
@pytest.mark.parametrize(
    "file",
    [file for file in FILES if file.parent != PACKAGE or file.stem != "__init__"],
    ids=lambda file: str(file.relative_to(PACKAGE)),
)
def test_imports_run_one_way(file):
    part = part_of(file.relative_to(PACKAGE).with_suffix("").parts)
    assert part in RANK, f"{part} has no place in ORDER"
    assert faults(part, file.read_text()) == []


@pytest.mark.parametrize(
    ("source", "fault"),
    [
        (
            "from structprune.planning.plan import Plan",
            "line 1: coupling imports planning.plan, which does not stand above it",
        ),
        ("def f():\n    import structprune.cli", "line 2: coupling imports cli, which does not stand above it"),
        ("import structprune", "line 1: imports the package's own __init__"),
        ("from structprune import prune", "line 1: imports the package's own __init__"),
        ("from .plan import Plan", "line 1: relative import .plan"),
        ("from . import plan", "line 1: relative import ."),
        ("from structprune.nowhere import x", "line 1: nowhere has no place in ORDER"),
    ],
)
def test_an_arrow_that_runs_up_is_seen(source, fault):
    (found,) = faults("coupling", source)
    assert found.startswith(fault)


def test_arrows_that_run_down_are_accepted():
    source = "import torch\nfrom structprune.errors import PlanError\nfrom structprune.coupling.graph.parts import Part"
    assert faults("coupling", source) == []


def test_every_place_is_taken():
    parts = {part_of(file.relative_to(PACKAGE).with_suffix("").parts) for file in FILES} - {"__init__"}
    assert parts == set(RANK)


def test_files_are_short():
    tests = Path(__file__).parent.rglob("*.py")
    lengths = {str(file): len(file.read_text().splitlines()) for file in (*FILES, *tests)}
    assert {name: length for name, length in lengths.items() if length > MAX_LINES} == {}


# How much may happen in one function: branches, loops, comprehensions with their conditions, and boolean operators,
# counted from 1.
COMPLEXITY = 15
BRANCHES = (ast.If, ast.For, ast.While, ast.IfExp, ast.ExceptHandler, ast.Assert, ast.match_case)
DEFINITIONS = (ast.FunctionDef, ast.AsyncFunctionDef, ast.ClassDef)


def complexity(function: ast.AST) -> int:
    """The number of ways through a function, without those of functions and classes inside it."""
    count, waiting = 1, list(ast.iter_child_nodes(function))
    while waiting:
        node = waiting.pop()
        if isinstance(node, DEFINITIONS):
            continue
        if isinstance(node, BRANCHES):
            count += 1
        elif isinstance(node, ast.comprehension):
            count += 1 + len(node.ifs)
        elif isinstance(node, ast.BoolOp):
            count += len(node.values) - 1
        waiting += ast.iter_child_nodes(node)
    return count


def too_complex(source: str, limit: int) -> dict[str, int]:
    functions = (
        node for node in ast.walk(ast.parse(source)) if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef))
    )
    return {function.name: count for function in functions if (count := complexity(function)) > limit}


def test_functions_are_simple():
    over = {str(file.relative_to(PACKAGE)): too_complex(file.read_text(), COMPLEXITY) for file in FILES}
    assert {file: functions for file, functions in over.items() if functions} == {}


@pytest.mark.parametrize(
    ("body", "count"),
    [
        ("return 1", 1),
        ("return 1 if a and b or c else 2", 4),
        ("return [x for x in y if x for z in x]", 4),
        ("for x in y:\n        if x:\n            return x", 3),
        ("def g():\n        return 1 if a else 2\n    return g", 1),
    ],
)
def test_complexity_is_counted(body, count):
    source = f"def f():\n    {body}"
    assert complexity(ast.parse(source).body[0]) == count
    assert "f" not in too_complex(source, count)
    assert too_complex(source, count - 1)["f"] == count


IMPORT_ALL = f"""
import importlib, pkgutil, sys
import structprune
for module in pkgutil.walk_packages(structprune.__path__, "structprune."):
    names = module.name.split(".")
    if names[-1] != "__main__" and not (names[1] == "integrations" and names[-1] in {FOR_ONE_LIBRARY!r}):
        importlib.import_module(module.name)
"""


@pytest.mark.parametrize(
    ("statement", "heavy"),
    [("import sys, structprune", HEAVY + COMMANDS), (IMPORT_ALL, HEAVY)],
    ids=["package", "every module"],
)
def test_importing_loads_nothing_heavy(statement, heavy):
    code = f"{statement}\nprint(sorted(set({heavy!r}) & set(sys.modules)))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


TESTS = Path(__file__).parent


def names_of_modules(source: str) -> Iterator[str]:
    """The modules that a file imports, by their full names."""
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            yield "." * node.level + (node.module or "")


def imports_a_test(source: str) -> list[str]:
    """What a file imports of other test files."""
    return [name for name in names_of_modules(source) if name.split(".")[0].startswith(("test_", "conftest", "tests"))]


@pytest.mark.parametrize("file", sorted(TESTS.rglob("*.py")), ids=lambda file: str(file.relative_to(TESTS)))
def test_tests_share_what_is_in_support_alone(file):
    """A test file imports the package, other packages and ``support``, never another test file."""
    assert imports_a_test(file.read_text()) == []


@pytest.mark.parametrize(
    "source", ["from test_oracle import x", "import test_oracle", "from tests.support import cases"]
)
def test_an_import_of_a_test_is_found(source):
    assert len(imports_a_test(source)) == 1


NO_MODULE_IS_HIDDEN = f"""{IMPORT_ALL}
for name in [name for name in sys.modules if name.startswith("structprune.")]:
    found = structprune
    for part in name.split(".")[1:]:
        found = vars(found)[part] if type(found) is type(sys) else None
    if found is not sys.modules[name]:
        print(name)
"""


def test_no_function_hides_the_module_of_its_name():
    """``import structprune.x`` gives the module, never something that the folder imports under that name."""
    done = subprocess.run([sys.executable, "-c", NO_MODULE_IS_HIDDEN], capture_output=True, text=True, check=True)
    assert done.stdout.split() == []


@pytest.mark.parametrize(
    ("module", "package", "extra"),
    [
        ("ignite", ["ignite"], "ignite"),
        ("lightning", ["lightning", "pytorch_lightning"], "lightning"),
        ("transformers", ["transformers"], "models"),
    ],
)
def test_an_integration_names_the_extra_that_it_needs(module, package, extra):
    code = f"""
import sys
class Missing:
    def find_spec(name, path=None, target=None):
        if name in {package!r}:
            raise ModuleNotFoundError(f"No module named {{name!r}}", name=name)
sys.meta_path.insert(0, Missing)
try:
    import structprune.integrations.{module}
except ImportError as error:
    print(type(error).__name__, error)
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.startswith("MissingExtraError")
    assert f"pip install 'structprune[{extra}]'" in done.stdout
