"""Import an emitted package from its folder."""

import importlib.util
import json
import sys
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from moegen.runtime.tile import LayerTiles


class PackageError(ValueError):
    """A folder that is not an emitted package; the message names it and what is missing."""


def read_manifest(folder: Path) -> dict[str, Any]:
    """The manifest of an emitted package; PackageError if there is none or it cannot be read."""
    path = folder / "manifest.json"
    if not path.is_file():
        raise PackageError(f"{folder} is not a package of moegen: it has no manifest.json")
    try:
        manifest = json.loads(path.read_text())
    except ValueError as error:
        raise PackageError(f"{path} is not JSON: {error}") from error
    if not isinstance(manifest, dict) or "files" not in manifest:
        raise PackageError(f"{path} has no list of files")
    return manifest


def import_package(folder: Path) -> ModuleType:
    """Import the package in `folder` under its own name, whatever sys.path holds; PackageError if it is none."""
    folder = folder.resolve()
    read_manifest(folder)
    init = folder / "__init__.py"
    built = (folder / "manifest.json").read_bytes()
    loaded = sys.modules.get(folder.name)
    if loaded is not None and loaded.__file__ == str(init) and loaded.__dict__.get("_manifest") == built:
        return loaded
    _forget(folder.name)  # a package of the same name from another folder, or an older build of this one
    spec = importlib.util.spec_from_file_location(folder.name, init, submodule_search_locations=[str(folder)])
    if spec is None or spec.loader is None:
        raise PackageError(f"{init} cannot be imported")
    module = importlib.util.module_from_spec(spec)
    sys.modules[folder.name] = module
    try:
        spec.loader.exec_module(module)
    except BaseException:
        _forget(folder.name)  # or the next import would find a half-executed module
        raise
    module.__dict__["_manifest"] = built
    return module


def with_tiles(module: ModuleType, tiles: "LayerTiles") -> Callable[..., Any]:
    """`fused_experts` of an imported package, checks included, with these tile configs instead of its own choice."""
    package = module._dispatch._PACKAGE
    run = sys.modules[type(package).__module__].run

    def fused_experts(*args: Any, **kwargs: Any) -> Any:  # noqa: ANN401 - those of the package
        package._run = lambda layer, call: run(layer, call, tiles)
        try:
            return module.fused_experts(*args, **kwargs)
        finally:
            del package._run

    return fused_experts


def _forget(package: str) -> None:
    for name in [name for name in sys.modules if name == package or name.startswith(f"{package}.")]:
        del sys.modules[name]
