"""The shape of the house: dependencies point one way, files stay small, templates read as Triton with holes."""

import ast
import re
from pathlib import Path

import pytest

from moegen.runtime.activations import ACTIVATIONS

ROOT = Path(__file__).resolve().parents[2]
MOEGEN = ROOT / "moegen"
TEMPLATES = ROOT / "templates"
MAX_LINES = 400
MAX_CONTROL_TAGS = 10

# A unit is a module or a subpackage of moegen. It may import units of the rows above its own, and itself.
ORDER = (
    ("__init__",),
    ("runtime",),
    ("quant", "quantize", "device"),
    ("checkpoints",),
    ("spec",),
    ("models", "huggingface"),
    ("plan",),
    ("render",),
    ("emit",),
    ("load",),
    ("aot", "bench", "interop"),
    ("tune",),
    ("cli",),
    ("__main__",),
)
RANK = {unit: rank for rank, row in enumerate(ORDER) for unit in row}


def unit_of(file: Path) -> str:
    """`moegen/bench/run.py` -> `bench`, `moegen/cli.py` -> `cli`."""
    return Path(file.relative_to(MOEGEN).parts[0]).stem


def imported_units(source: str) -> set[str]:
    """The units of moegen that a source imports, wherever in the file and for whatever purpose."""
    found = set()
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom) and node.level == 0:
            names = [f"{node.module}.{alias.name}" for alias in node.names]
        else:
            continue
        parts = [name.split(".") for name in names]
        found |= {part[1] if len(part) > 1 else "__init__" for part in parts if part[0] == "moegen"}
    return {"__init__" if name.startswith("__") and name != "__main__" else name for name in found}


def test_every_unit_has_a_place() -> None:
    assert {unit_of(file) for file in MOEGEN.rglob("*.py")} == set(RANK)


@pytest.mark.parametrize("file", sorted(MOEGEN.rglob("*.py")), ids=lambda file: file.relative_to(MOEGEN).as_posix())
def test_dependencies_point_one_way(file: Path) -> None:
    unit = unit_of(file)
    wrong = {other for other in imported_units(file.read_text()) if other != unit and RANK[other] >= RANK[unit]}
    assert not wrong, f"{unit} must not import {', '.join(sorted(wrong))}"


@pytest.mark.parametrize("file", sorted((MOEGEN / "runtime").glob("*.py")), ids=lambda file: file.name)
def test_runtime_imports_itself_relatively(file: Path) -> None:
    """It is copied into packages, where no `moegen` exists and no folder lies above it."""
    source = file.read_text()
    levels = {node.level for node in ast.walk(ast.parse(source)) if isinstance(node, ast.ImportFrom)}
    assert levels <= {0, 1}
    assert not imported_units(source)


def test_imported_units() -> None:
    source = (
        "import moegen\nimport moegen.spec\nfrom moegen import plan\nfrom moegen.bench.run import main\nimport os\n"
    )
    assert imported_units(source) == {"__init__", "spec", "plan", "bench"}


def hidden_assignments(source: str) -> list[str]:
    """`a = b` before a loop and again in it: Triton, which visits the body once to see what changes, misses `a`."""
    found = []
    for function in (node for node in ast.walk(ast.parse(source)) if isinstance(node, ast.FunctionDef)):
        assignments = [node for node in ast.walk(function) if isinstance(node, ast.Assign)]
        of_names = [node for node in assignments if {type(node.value), type(node.targets[0])} == {ast.Name}]
        copies = [(ast.unparse(node), node.lineno) for node in of_names]
        for loop in (node for node in ast.walk(function) if isinstance(node, ast.For | ast.While)):
            before = {text for text, line in copies if line < loop.lineno}
            inside = {text for text, line in copies if loop.lineno <= line <= (loop.end_lineno or 0)}
            found += [f"{function.name}: {text}" for text in sorted(before & inside)]
    return found


def test_hidden_assignments() -> None:
    source = "def f(n):\n    {} = stage\n    for k in range(n):\n        use(behind)\n        behind = stage\n"
    assert hidden_assignments(source.format("behind")) == ["f: behind = stage"]
    assert hidden_assignments(source.format("other")) == []


@pytest.mark.parametrize("file", sorted((MOEGEN / "runtime").glob("*.py")), ids=lambda file: file.name)
def test_triton_sees_every_assignment_of_a_loop(file: Path) -> None:
    assert hidden_assignments(file.read_text()) == []


def test_files_stay_small() -> None:
    files = [file for folder in (MOEGEN, TEMPLATES) for file in folder.rglob("*") if file.suffix in (".py", ".jinja")]
    lines = {file.relative_to(ROOT).as_posix(): file.read_text().count("\n") for file in files}
    assert {name: count for name, count in lines.items() if count > MAX_LINES} == {}


@pytest.mark.parametrize("file", sorted((TEMPLATES / "kernels").rglob("*.jinja")), ids=lambda file: file.name)
def test_kernel_templates_have_few_control_tags(file: Path) -> None:
    """Every tag counts but those that end another one."""
    tags = re.findall(r"\{%[-+]?\s*(\w+)", file.read_text())
    assert len([tag for tag in tags if not tag.startswith("end")]) <= MAX_CONTROL_TAGS


def test_every_activation_has_a_template() -> None:
    names = {file.name.removesuffix(".py.jinja") for file in (TEMPLATES / "kernels" / "activations").iterdir()}
    assert names == set(ACTIVATIONS)
