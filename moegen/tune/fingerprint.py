"""What a measured time depends on beside the tiles: a hash of the kernels that ran, and whether it still holds."""

import functools
import hashlib
from collections.abc import Mapping
from pathlib import Path

from moegen.emit import TESTED, package_files
from moegen.load import PackageError, read_manifest
from moegen.plan import Plan, make_plan
from moegen.runtime.quant import Scheme
from moegen.spec import MoESpec, Parallel, Shape, VariantSpec

_LENGTH = 16


def package_kernels(folder: Path, slug: str) -> str:
    """Hash of the kernels that layer `slug` of the emitted package in `folder` runs; PackageError if it is none."""
    plan = make_plan(MoESpec.from_dict(read_manifest(folder)["spec"], str(folder)))
    files = {path.relative_to(folder).as_posix(): path.read_bytes() for path in folder.rglob("*.py")}
    try:
        return _kernels(plan, slug, files)
    except KeyError as error:
        raise PackageError(f"{folder} has no {error}; build it again: moegen build {folder}/spec.yaml") from error


@functools.cache
def current_kernels(variant: VariantSpec) -> str:
    """The same hash for a package that would be built now."""
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


def why_stale(kernels: str, triton: str, variant: VariantSpec) -> str | None:
    """Why times of these kernels under this Triton need not hold any more, or None."""
    if triton not in {pair["triton"] for pair in TESTED}:
        known = ", ".join(pair["triton"] for pair in TESTED)
        return f"tuned with Triton {triton or '(not stated)'}, supported: {known}"
    if kernels != current_kernels(variant):
        return "the layer's kernels have changed since it was tuned"
    return None


def _sources(scheme: Scheme) -> tuple[str, ...]:
    """Modules of the runtime with kernels that layers of this scheme launch, and with functions that those call."""
    quantised = scheme.row.activation is not None
    w8a8 = scheme.mode in ("fp8_w8a8", "int8_w8a8")
    names = ["align", "kernel_parts", "reduce"]
    names += ["quantise"] if quantised else []
    names += ["decode"] if scheme.kind else []
    if not scheme.kind or w8a8:
        names += [f"cooperative_{name}" for name in ("finish", "kernel", "products", "sizes")]
        names += ["stream_kernel", "stream_parts", "stream_sizes"]
    names += ["stream_w8a8"] if w8a8 else []
    return tuple(names)


def _kernels(plan: Plan, slug: str, files: Mapping[str, bytes]) -> str:
    layer = next(layer for layer in plan.layers if layer.variant.slug == slug)
    digest = hashlib.sha256()
    for name in (f"{layer.module}.py", *(f"runtime/{name}.py" for name in _sources(layer.variant.scheme))):
        lines = [
            line for line in files[name].decode().splitlines() if line.strip() and not line.lstrip().startswith("#")
        ]
        digest.update("\n".join([name, *lines]).encode() + b"\0")
    return digest.hexdigest()[:_LENGTH]
