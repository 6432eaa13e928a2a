"""The shapes of released models: `models.yaml` as checked records, and a spec for one of them by name."""

import difflib
from dataclasses import dataclass
from functools import cache
from pathlib import Path

from moegen.runtime.activations import Activation
from moegen.runtime.quant import Scheme
from moegen.spec import MoESpec, Parallel, Shape, SpecError, parse_activation, read_yaml

MODELS_FILE = Path(__file__).with_name("models.yaml")

_SHAPE_KEYS = ("num_experts", "top_k", "hidden_size", "intermediate_size")
_REQUIRED = ("title", *_SHAPE_KEYS, "activation", "source")
_OPTIONAL = ("also", "bias", "dtypes", "released", "quant", "notes")


@dataclass(frozen=True, slots=True, kw_only=True)
class Model:
    """One entry of models.yaml: the routed experts of a released model, before any split over GPUs."""

    name: str
    title: str
    also: tuple[str, ...]  # other names of models with the same layer; they find this entry
    shape: Shape
    activation: Activation
    bias: bool
    dtypes: tuple[str, ...]  # of the activations, as released
    released: tuple[str, ...]  # weight formats on offer, free text
    quant: tuple[str, ...]  # names of the schemes that read them; formats that no scheme reads are left out
    source: str  # where the sizes come from; the head of models.yaml explains the words
    notes: str


@cache
def _models() -> dict[str, Model]:
    entries = read_yaml(MODELS_FILE)
    if not isinstance(entries, dict):
        raise SpecError(f"{MODELS_FILE}: allowed: a mapping of model names")
    try:
        return {name: _model(name, entry) for name, entry in entries.items()}
    except SpecError as error:
        raise SpecError(f"{MODELS_FILE}: {error}") from None


def _model(name: str, entry: object) -> Model:
    if not isinstance(entry, dict):
        raise SpecError(f"{name}: {entry!r} is not allowed; allowed: a mapping with {', '.join(_REQUIRED)}")
    unknown = [key for key in entry if key not in _REQUIRED + _OPTIONAL]
    missing = [key for key in _REQUIRED if key not in entry]
    if unknown or missing:
        raise SpecError(f"{name}: unknown keys {unknown}, missing keys {missing}; required: {', '.join(_REQUIRED)}")
    try:
        shape = Shape(**{key: entry[key] for key in _SHAPE_KEYS})
    except SpecError as error:
        raise SpecError(f"{name}.{error}") from None
    return Model(
        name=name,
        title=entry["title"],
        also=tuple(entry.get("also", ())),
        shape=shape,
        activation=parse_activation(entry["activation"], f"{name}.activation"),
        bias=entry.get("bias", False),
        dtypes=tuple(entry.get("dtypes", ("bfloat16",))),
        released=tuple(entry.get("released", ())),
        quant=_schemes(entry.get("quant", []), f"{name}.quant"),
        source=entry["source"],
        notes=entry.get("notes", ""),
    )


def _schemes(items: object, path: str) -> tuple[str, ...]:
    if not isinstance(items, list):
        raise SpecError(f"{path}: {items!r} is not allowed; allowed: a list")
    names: list[str] = []
    for index, item in enumerate(items):
        try:
            scheme = Scheme.parse(str(item)).name
        except ValueError as error:
            raise SpecError(f"{path}[{index}]: {error}") from error
        if scheme in names:
            raise SpecError(f"{path}[{index}]: {item!r} is not allowed; allowed: each scheme once")
        names.append(scheme)
    return tuple(names)


def load_models() -> dict[str, Model]:
    """All entries of models.yaml by name, in the order of the file; SpecError if the file is broken."""
    return dict(_models())


def find_model(name: str) -> Model:
    """The entry of that name or `also` name, in any case, with or without the owner (`Qwen/Qwen3-30B-A3B`).

    Raises SpecError with the closest names.
    """
    wanted = name.rsplit("/", 1)[-1].lower()
    names = {alias: model for model in _models().values() for alias in (model.name, *model.also)}
    if wanted in names:
        return names[wanted]
    close = difflib.get_close_matches(wanted, names, n=5)
    allowed = f"close matches: {', '.join(close)}" if close else "`load_models` has all the names"
    raise SpecError(f"model: {name!r} is unknown; {allowed}")


def model_spec(
    name: str,
    parallel: tuple[Parallel, ...] = (Parallel(),),
    dtypes: tuple[str, ...] | None = None,
    quant: tuple[str, ...] = ("none",),
) -> MoESpec:
    """The spec of a known model; dtypes default to the released ones. SpecError for an unknown name or a bad split."""
    model = find_model(name)
    try:
        return MoESpec(
            name=model.name,
            shapes=(model.shape,),
            dtypes=model.dtypes if dtypes is None else dtypes,
            quant=quant,
            activation=model.activation,
            bias=model.bias,
            parallel=parallel,
        )
    except SpecError as error:
        raise SpecError(f"model {model.name}: {error}") from None
