"""An emitted package needs torch, triton and the standard library, and nothing else: neither moegen nor its tools."""

import ast
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from moegen.emit import emit
from moegen.plan import make_plan
from moegen.runtime.activations import Activation
from moegen.runtime.reference import moe_reference
from moegen.spec import MoESpec, Parallel, Shape

ALLOWED = {"torch", "triton", *sys.stdlib_module_names}
BLOCKED = ("moegen", "jinja2", "yaml", "optuna")
SHAPE = Shape(num_experts=8, top_k=2, hidden_size=32, intermediate_size=16)
SPECS = {
    "silu": MoESpec(name="plain", shapes=(SHAPE,), dtypes=("float32", "bfloat16")),
    "swigluoai": MoESpec(
        name="rich",
        shapes=(SHAPE,),
        dtypes=("float32",),
        activation=Activation.of("swigluoai"),
        bias=True,
        parallel=(Parallel(), Parallel(ep=2)),
    ),
    "relu2_no_mul": MoESpec(
        name="ungated", shapes=(SHAPE,), dtypes=("float32",), activation=Activation.of("relu2_no_mul")
    ),
}

# argv: folder of the package, its name, the file with the inputs and the expected output
RUN_ALONE = f"""
import importlib, sys

class Blocker:
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] in {BLOCKED!r}:
            raise ImportError(name + " is blocked: an emitted package must not need it")

sys.meta_path.insert(0, Blocker())
sys.path[0] = sys.argv[1]
import torch

package = importlib.import_module(sys.argv[2])
data = torch.load(sys.argv[3])
out = package.fused_experts(*data["inputs"], **data["keywords"])
torch.testing.assert_close(out.double(), data["expected"], atol=1e-5, rtol=1e-4)
found = [name for name in sys.modules if name.split(".")[0] in {BLOCKED!r}]
assert not found, found
print("ran alone:", tuple(out.shape))
"""


def foreign_imports(file: Path, package: Path) -> list[str]:
    """The imports of `file` that reach outside of `package`, torch, triton and the standard library."""
    found = []
    depth = len(file.relative_to(package).parts)
    for node in ast.walk(ast.parse(file.read_text())):
        if isinstance(node, ast.Import):
            found += [alias.name for alias in node.names if alias.name.split(".")[0] not in ALLOWED]
        elif isinstance(node, ast.ImportFrom) and node.level == 0:
            module = node.module or ""
            found += [module] if module.split(".")[0] not in ALLOWED else []
        elif isinstance(node, ast.ImportFrom) and node.level > depth:
            found.append("." * node.level + (node.module or ""))
    return found


@pytest.mark.parametrize("name", SPECS)
def test_imports(name: str, tmp_path: Path) -> None:
    package = emit(make_plan(SPECS[name]), tmp_path)
    files = sorted(package.rglob("*.py"))
    assert len(files) > 5
    foreign = {file.relative_to(package).as_posix(): foreign_imports(file, package) for file in files}
    assert {file: names for file, names in foreign.items() if names} == {}


def test_scan_sees_foreign_imports(tmp_path: Path) -> None:
    file = tmp_path / "runtime" / "bad.py"
    file.parent.mkdir()
    file.write_text("import os, yaml\nfrom moegen.spec import x\nfrom ..good import y\nfrom ...far import z\n")
    assert foreign_imports(file, tmp_path) == ["yaml", "moegen.spec", "...far"]


@pytest.mark.parametrize("name", SPECS)
def test_runs_alone(name: str, tmp_path: Path) -> None:
    spec = SPECS[name]
    package = emit(make_plan(spec), tmp_path)
    data = tmp_path / "data.pt"
    torch.save(layer_call(spec), data)
    command = [sys.executable, "-c", RUN_ALONE, str(tmp_path), package.name, str(data)]
    done = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path)  # noqa: S603
    assert done.returncode == 0, done.stdout + done.stderr
    assert "ran alone: (5, 32)" in done.stdout


def layer_call(spec: MoESpec) -> dict[str, object]:
    """Inputs of one float32 call with a padding slot, and what the float64 oracle makes of them."""
    generator = torch.Generator().manual_seed(0)

    def random(*shape: int) -> torch.Tensor:
        return torch.randn(shape, generator=generator)

    variant = spec.variants()[0]
    w13, w2 = random(*variant.w13_shape), random(*variant.w2_shape)
    weights, ids = random(5, variant.num_experts).softmax(-1).topk(variant.top_k)
    ids[2, 1] = -1
    inputs = (random(5, variant.hidden_size), w13, w2, weights, ids.int())
    keywords: dict[str, Any] = {}
    if spec.bias:
        keywords = {"w13_bias": random(*w13.shape[:2]), "w2_bias": random(*w2.shape[:2])}
    expected = moe_reference(*inputs, spec.activation, **keywords)
    return {"inputs": inputs, "keywords": keywords, "expected": expected}
