"""What a measured time depends on beside the tiles: hashes of the kernels that ran, and whether they still hold.

A layer has one hash a kernel family, joined by dots in the order of FAMILIES: a time of one family outlives changes of
another. What is hashed are the kernels as Python reads them and the constants that they name, so a time also outlives
comments, host code beside a kernel, and a kernel's way into another file.
"""

import ast
import functools
import hashlib
from collections.abc import Mapping
from pathlib import Path

from moegen.emit import TESTED, package_files
from moegen.load import PackageError, read_manifest
from moegen.plan import Plan, make_plan
from moegen.runtime.quant import Scheme
from moegen.runtime.tile import FAMILIES
from moegen.spec import MoESpec, Parallel, Shape, VariantSpec

_LENGTH = 16


def package_kernels(folder: Path, slug: str) -> str:
    """Hashes of the kernels that layer `slug` of the emitted package in `folder` runs; PackageError if it is none."""
    plan = make_plan(MoESpec.from_dict(read_manifest(folder)["spec"], str(folder)))
    files = {path.relative_to(folder).as_posix(): path.read_bytes() for path in folder.rglob("*.py")}
    try:
        return _kernels(plan, slug, files)
    except KeyError as error:
        raise PackageError(f"{folder} has no {error}; build it again: moegen build {folder}/spec.yaml") from error


@functools.cache
def current_kernels(variant: VariantSpec) -> str:
    """The same hashes for a package that would be built now."""
    plan = make_plan(spec_of(variant))
    return _kernels(plan, variant.slug, package_files(plan))


def spec_of(variant: VariantSpec) -> MoESpec:
    """The spec of a package that holds this one layer."""
    shape = Shape(
        num_experts=variant.num_experts,
        top_k=variant.top_k,
        hidden_size=variant.hidden_size,
        intermediate_size=variant.intermediate_size,
    )
    return MoESpec(
        name=variant.slug,
        shapes=(shape,),
        dtypes=(variant.dtype,),
        quant=(variant.quant,),
        activation=variant.activation,
        bias=variant.bias,
        parallel=(Parallel(ep=variant.num_experts // variant.local_experts),),
    )


def is_current(kernels: str, family: str, variant: VariantSpec) -> bool:
    """Whether a package that would be built now has the same kernels of one family."""
    then, now = (dict(zip(FAMILIES, one.split("."), strict=False)) for one in (kernels, current_kernels(variant)))
    return then.get(family) == now.get(family)


def why_stale(kernels: str, family: str, triton: str, variant: VariantSpec) -> str | None:
    """Why times of one of these kernel families under this Triton need not hold any more, or None."""
    if triton not in {pair["triton"] for pair in TESTED}:
        known = ", ".join(pair["triton"] for pair in TESTED)
        return f"tuned with Triton {triton or '(not stated)'}, supported: {known}"
    if not is_current(kernels, family, variant):
        return "their kernels have changed since they were tuned"
    return None


def _sources(scheme: Scheme) -> dict[str, tuple[str, ...]]:
    """Family -> modules of the runtime with kernels that layers of this scheme launch, and with what those call."""
    w8a8 = scheme.mode in ("fp8_w8a8", "int8_w8a8")
    shared = ["align_kernels", "kernel_parts", "reduce"]
    shared += ["quantise"] if scheme.row.activation is not None else []
    shared += ["decode"] if scheme.kind else []
    found: dict[str, tuple[str, ...]] = {"portable": tuple(shared)}
    if not scheme.kind or w8a8:
        own = [f"cooperative_{name}" for name in ("finish", "flow", "kernel", "produce", "products", "sizes")]
        found["cooperative"] = (*shared, *own, "gluon_parts")
        # One launch: nothing of the assignment, the quantisers and the reduce.
        own = [f"stream_{name}" for name in ("kernel", "parts", "rows", "scales", "sizes")]
        found["stream"] = ("kernel_parts", *(["decode"] if scheme.kind else []), *own, "gluon_parts")
    return found


def _kernels(plan: Plan, slug: str, files: Mapping[str, bytes]) -> str:
    layer = next(layer for layer in plan.layers if layer.variant.slug == slug)
    sources = _sources(layer.variant.scheme)
    return ".".join(_hash(layer.module, sources[family], files) for family in FAMILIES if family in sources)


def _hash(module: str, sources: tuple[str, ...], files: Mapping[str, bytes]) -> str:
    """Of all that compiled kernels are made of in the layer's own module and these of the runtime."""
    parts = [
        part
        for name in (module, *(f"runtime/{name}" for name in sources))
        for part in _kernel_code(files[f"{name}.py"], whole=name.endswith("_sizes"))
    ]
    return hashlib.sha256("\n".join(sorted(parts)).encode()).hexdigest()[:_LENGTH]


@functools.cache
def _kernel_code(source: bytes, whole: bool) -> tuple[str, ...]:
    """The functions that a decorator `jit` compiles and the constants of kernels, without comments and docstrings.

    whole: everything, of a module whose ordinary Python decides what a kernel is compiled for.
    """
    tree = ast.parse(source)
    for node in ast.walk(tree):
        if isinstance(node, ast.FunctionDef | ast.ClassDef) and ast.get_docstring(node) is not None:
            node.body = node.body[1:] or [ast.Pass()]
    return tuple(
        ast.unparse(node) for node in tree.body if (whole and not isinstance(node, ast.Expr)) or _is_compiled(node)
    )


def _is_compiled(node: ast.stmt) -> bool:
    if isinstance(node, ast.FunctionDef):
        return any("jit" in ast.unparse(decorator) for decorator in node.decorator_list)
    return isinstance(node, ast.Assign | ast.AnnAssign) and "constexpr" in ast.unparse(node)
