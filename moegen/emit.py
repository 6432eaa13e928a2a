"""plan -> package folder: rendered modules, the runtime, config records and a manifest, all or nothing."""

import hashlib
import json
import shutil
import tempfile
from collections.abc import Collection
from pathlib import Path

import yaml

from moegen import __version__
from moegen.plan import Plan
from moegen.render import data_folder, render, template_hash
from moegen.spec import VariantSpec

MANIFEST_FORMAT = 1
# The pairs of versions that the suite and the H200 measurements run with.
TESTED = ({"torch": "2.11.0", "triton": "3.6.0"}, {"torch": "2.13.0", "triton": "3.7.1"})
RUNTIME = Path(__file__).parent / "runtime"


class EmitError(Exception):
    """A package that cannot be written; nothing half-written is left behind."""


def emit(plan: Plan, out: Path) -> Path:
    """Write the package of `plan` below the folder `out` and return its folder; an older one is replaced.

    The files are written to a temporary folder beside it and renamed into place, so a failure (RenderError,
    EmitError) leaves an older package as it was. The same plan always gives the same bytes, but for config records that
    were written into the older package after it was built (`own_records`): they stay, in place of published ones.
    """
    target = out / plan.package_name
    try:
        own = own_records(target)
        files = {**package_files(plan, without=own), **own}
        _write(files, target)
    except OSError as error:
        raise EmitError(f"{target} cannot be written: {error}") from error
    return target


def _write(files: dict[str, bytes], target: Path) -> None:
    if target.exists() and not (target / "manifest.json").is_file():
        raise EmitError(f"{target} exists and is not a package of moegen (it has no manifest.json); it stays as it is")
    target.parent.mkdir(parents=True, exist_ok=True)
    scratch = Path(tempfile.mkdtemp(prefix=f".{target.name}-", dir=target.parent))
    new, old = scratch / "new", scratch / "old"
    try:
        for name, data in files.items():
            path = new / name
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes(data)
        if target.exists():
            target.replace(old)
        new.replace(target)
    except BaseException:
        if old.exists() and not target.exists():
            old.replace(target)
        raise
    finally:
        shutil.rmtree(scratch, ignore_errors=True)


def own_records(package: Path) -> dict[str, bytes]:
    """The config records in the folder of a package that its build did not put there, by their paths inside it.

    They are the ones that its manifest does not list, or lists with another hash; all, if it has no sound manifest.
    """
    try:
        listed = json.loads((package / "manifest.json").read_text())["files"]
        listed = listed if isinstance(listed, dict) else {}
    except (OSError, ValueError, KeyError, TypeError):
        listed = {}
    found = {
        path.relative_to(package).as_posix(): path.read_bytes() for path in sorted(package.glob("configs/*/*.json"))
    }
    return {name: data for name, data in found.items() if listed.get(name) != hashlib.sha256(data).hexdigest()}


def package_files(plan: Plan, without: Collection[str] = ()) -> dict[str, bytes]:
    """Every file of the package but `without`, by its path inside it, in sorted order, the manifest included."""
    spec_yaml = yaml.safe_dump(plan.spec.to_dict(), sort_keys=False).encode()
    files = {"spec.yaml": spec_yaml, **_rendered(plan), **_runtime(), **_configs(plan)}
    files = {name: files[name] for name in sorted(files) if name not in without}
    manifest = {
        "format": MANIFEST_FORMAT,
        "moegen": __version__,
        "package": plan.package_name,
        "spec": plan.spec.to_dict(),
        "layers": [layer.variant.slug for layer in plan.layers],
        "modules": [module.name for module in plan.modules],
        "template_hash": template_hash(),
        "tested": list(TESTED),
        "files": {name: hashlib.sha256(data).hexdigest() for name, data in files.items()},
    }
    return {**files, "manifest.json": (json.dumps(manifest, indent=1) + "\n").encode()}


def _rendered(plan: Plan) -> dict[str, bytes]:
    spec = plan.spec
    header = _header(plan)
    layers = [{**_layer_context(item.variant), "module": item.module} for item in plan.layers]
    shared: dict[str, object] = {
        "header": header,
        "spec": spec,
        "layers": layers,
        "modules": [module.name for module in plan.modules],
        "gated": spec.activation.gated,
        "interleaved": spec.activation.interleaved,
        "bias": spec.bias,
    }
    sources = {}
    for module in plan.modules:
        imports = {"along_rows", "along_tokens", "pdl_begin", "tile_order"}
        if module.activation.gated:
            imports |= {"gate_up_rows", "split_gate_up"}
        context = {
            "header": header,
            "quant": module.quant,
            "activation": module.activation,
            "imports": sorted(imports),
        }
        sources[f"{module.name}.py"] = render("kernels/module.py.jinja", context)
    fingerprint = hashlib.sha256("".join([template_hash(), repr(spec), *sources.values()]).encode()).hexdigest()
    shared["op_namespace"] = f"moegen_{spec.slug}_{fingerprint[:8]}"
    for name in ("__init__.py", "_dispatch.py"):
        sources[name] = render(f"package/{name}.jinja", shared)
    return {name: source.encode() for name, source in sources.items()}


def _layer_context(variant: VariantSpec) -> dict[str, object]:
    names = (
        "slug",
        "num_experts",
        "local_experts",
        "top_k",
        "hidden_size",
        "intermediate_size",
        "dtype",
        "quant",
        "bias",
    )
    activation = repr(variant.activation).replace("'", '"')  # as source is formatted
    return {"activation": activation, **{name: getattr(variant, name) for name in names}}


def _header(plan: Plan) -> str:
    return "\n".join(
        [
            f"# Generated by moegen {__version__} for {plan.spec.name}; edit the templates, not this file.",
            f"# Templates sha256 {template_hash()[:16]}; regenerate: moegen build {plan.package_name}/spec.yaml -o .",
        ]
    )


def _runtime() -> dict[str, bytes]:
    return {f"runtime/{path.name}": path.read_bytes() for path in sorted(RUNTIME.glob("*.py"))}


def _configs(plan: Plan) -> dict[str, bytes]:
    """The published config records of this package's layers, for every GPU that has one."""
    folder = data_folder("tuned_configs")
    names = {f"{layer.variant.slug}.json" for layer in plan.layers}
    found = [path for path in sorted(folder.glob("*/*.json")) if path.name in names]
    return {f"configs/{path.relative_to(folder).as_posix()}": path.read_bytes() for path in found}
