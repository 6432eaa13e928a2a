"""What is compared: the emitted package under test and any Python callable with the arguments of fused_experts."""

import importlib.util
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType

PACKAGE = "moegen"  # the provider name of the package under test


class PackageError(Exception):
    """The folder is not an emitted package."""


class PeerError(Exception):
    """A --peer argument that cannot be used; the message names it."""


@dataclass(frozen=True, slots=True)
class Candidate:
    """A provider that is checked and timed: function(x, w13, w2, topk_weights, topk_ids, **kwargs) -> [T, H]."""

    name: str
    function: Callable[..., object]


@dataclass(frozen=True, slots=True)
class PeerArgument:
    """`FILE.py:function[=label]`, parsed; the file exists."""

    file: Path
    function: str
    label: str


def parse_peer(argument: str) -> PeerArgument:
    """Split `FILE.py:function[=label]`; without a label it is `<file stem>.<function>`. Raises PeerError."""
    file, colon, rest = argument.rpartition(":")
    function, equals, label = rest.partition("=")
    if not (colon and file and function.isidentifier()) or (equals and not label):
        raise PeerError(f"--peer {argument}: must be FILE.py:function or FILE.py:function=label")
    path = Path(file)
    if path.suffix != ".py" or not path.is_file():
        raise PeerError(f"--peer {argument}: no Python file {file}")
    return PeerArgument(path.resolve(), function, label or f"{path.stem}.{function}")


def parse_peers(arguments: Sequence[str]) -> list[PeerArgument]:
    """Parse all --peer arguments; labels must differ from each other and from the package's name."""
    peers = [parse_peer(argument) for argument in arguments]
    seen = {PACKAGE}
    for argument, peer in zip(arguments, peers, strict=True):
        if peer.label in seen:
            raise PeerError(f"--peer {argument}: the label {peer.label!r} is taken, give another with =label")
        seen.add(peer.label)
    return peers


def load_peer(argument: str | PeerArgument) -> Candidate:
    """Import the file (its folder is searched for what it imports) and return the callable. Raises PeerError."""
    peer = parse_peer(argument) if isinstance(argument, str) else argument
    named = f"--peer {peer.file.name}:{peer.function}"
    folder = str(peer.file.parent)
    if folder not in sys.path:
        sys.path.append(folder)  # last: a peer's files must not hide installed modules
    try:
        module = _import_file(f"_moegen_peer_{peer.file.parent.name}_{peer.file.stem}", peer.file)
    except Exception as error:  # a peer is foreign code: whatever it raises is reported by its argument
        raise PeerError(f"{named}: importing it failed: {type(error).__name__}: {error}") from error
    function = getattr(module, peer.function, None)
    if not callable(function):
        names = sorted(name for name, value in vars(module).items() if callable(value) and not name.startswith("_"))
        raise PeerError(f"{named}: no such function; the file has {', '.join(names) or 'none'}")
    return Candidate(peer.label, function)


def load_package(folder: Path) -> ModuleType:
    """Import an emitted package by its folder. Raises PackageError if it lacks fused_experts, warmup or LAYERS."""
    init = folder / "__init__.py"
    if not init.is_file():
        raise PackageError(f"{folder}: not an emitted package, it has no __init__.py")
    name = folder.resolve().name
    try:
        module = _import_file(name, init.resolve(), package=True)
    except Exception as error:  # a damaged package may raise anything while it is imported
        raise PackageError(f"{folder}: importing it failed: {type(error).__name__}: {error}") from error
    missing = [attribute for attribute in ("fused_experts", "warmup", "LAYERS") if not hasattr(module, attribute)]
    if missing:
        raise PackageError(f"{folder}: not an emitted package, it has no {', '.join(missing)}")
    return module


def _import_file(name: str, file: Path, *, package: bool = False) -> ModuleType:
    """Import `file` as `name`, anew even if a module of that name is loaded."""
    search = [str(file.parent)] if package else None
    spec = importlib.util.spec_from_file_location(name, file, submodule_search_locations=search)
    if spec is None or spec.loader is None:
        raise ImportError(f"{file} is not a Python file")
    module = importlib.util.module_from_spec(spec)
    before = sys.modules.get(name)
    sys.modules[name] = module  # Triton and relative imports look modules up there
    try:
        spec.loader.exec_module(module)
    except BaseException:
        if before is None:
            del sys.modules[name]
        else:
            sys.modules[name] = before
        raise
    return module
