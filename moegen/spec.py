"""MoESpec: what a package is built for. VariantSpec: one concrete layer of it, the unit of kernels and configs.

All four dataclasses check themselves, so a spec that exists is a valid one. Every SpecError reads
`path.of.key: value is not allowed; allowed: ...`; what was read from a file has the file in front.
"""

import re
from collections.abc import Callable, Collection, Mapping
from dataclasses import MISSING, asdict, dataclass, fields, replace
from itertools import combinations, product
from pathlib import Path
from typing import Any

import yaml

from moegen.runtime.activations import Activation
from moegen.runtime.quant import Scheme

DTYPES = ("bfloat16", "float16", "float32")
MAX_EXPERTS = 1024
MAX_TOP_K = 32  # the reduce kernel keeps a token's live slots as the bits of one int32

_SHORT_DTYPE = {"bfloat16": "bf16", "float16": "fp16", "float32": "fp32"}
_SILU = Activation()
_NAME = re.compile(r"[a-z0-9][a-z0-9._-]*")


class SpecError(ValueError):
    """A spec, model or config.json is not usable; the message names the key, its value and what is allowed."""


def _refused(path: str, value: object, allowed: str) -> SpecError:
    return SpecError(f"{path}: {value!r} is not allowed; allowed: {allowed}")


def _check_sizes(num_experts: int, top_k: int, hidden_size: int, intermediate_size: int) -> None:
    _check_int("num_experts", num_experts, MAX_EXPERTS)
    most, name = (num_experts, "num_experts") if num_experts <= MAX_TOP_K else (MAX_TOP_K, "")
    _check_int("top_k", top_k, most, name)
    _check_int("hidden_size", hidden_size)
    _check_int("intermediate_size", intermediate_size)


def _check_int(path: str, value: object, high: int | None = None, high_name: str = "") -> None:
    # type() and not isinstance: True would pass as 1
    if type(value) is not int or value < 1 or (high is not None and value > high):
        upper = f"{high} ({high_name})" if high_name else f"{high}"
        raise _refused(path, value, "an integer of at least 1" if high is None else f"an integer from 1 to {upper}")


def _check_choice(path: str, value: object, choices: Collection[str]) -> None:
    if not isinstance(value, str) or value not in choices:
        raise _refused(path, value, ", ".join(choices))


def _check_type(path: str, value: object, kind: type, allowed: str) -> None:
    if not isinstance(value, kind):
        raise _refused(path, value, allowed)


def _check_items(path: str, items: object, check: Callable[[str, object], None]) -> None:
    if not isinstance(items, tuple) or not items:
        raise _refused(path, items, "one item or more")
    for index, item in enumerate(items):
        check(f"{path}[{index}]", item)
        if item in items[:index]:
            raise _refused(f"{path}[{index}]", item, f"each item once; this one repeats {path}[{items.index(item)}]")


def _check_divides(path: str, split: int, size_path: str, size: int) -> None:
    if size % split:
        raise _refused(path, split, f"a divisor of {size_path} = {size}")


def _check_scheme(path: str, value: object) -> None:
    if not isinstance(value, str):
        raise _refused(path, value, "the name of a quant mode")
    try:
        Scheme.parse(value)
    except ValueError as error:
        raise SpecError(f"{path}: {error}") from error


def _check_told_apart(variants: Collection["VariantSpec"], quant: tuple[str, ...]) -> None:
    """Two schemes of one package must differ in tensors that a call passes, since those alone select the layer."""
    names = [Scheme.parse(item).name for item in quant]
    for (i, one), (j, other) in combinations(enumerate(names), 2):
        for variant in variants:
            if variant.quant == one and _stored_alike(variant, replace(variant, quant=other)):
                form = f"in {variant.slug} both store weights and scales in the same types and shapes"
                allowed = f"a scheme that a call can tell from quant[{i}], {quant[i]!r}; {form}: build two packages"
                raise _refused(f"quant[{j}]", quant[j], allowed)


def _stored_alike(one: "VariantSpec", other: "VariantSpec") -> bool:
    a, b = one.scheme, other.scheme
    types = [
        {one.dtype if name == "activation" else name for name in names or (one.dtype,)}
        for names in (a.weight_dtypes, b.weight_dtypes, a.scale_dtypes, b.scale_dtypes)
    ]
    if not (types[0] & types[1] and types[2] & types[3]):
        return False
    for shape in (one.w13_shape, one.w2_shape):
        scales = [scheme.scale_shape(*shape) or () for scheme in (a, b)]
        if not {scales[0], (*scales[0], 1)} & {scales[1], (*scales[1], 1)}:  # a trailing 1 is accepted
            return False
        if a.weight_shape(*shape) != b.weight_shape(*shape) or a.zeros_shape(*shape) != b.zeros_shape(*shape):
            return False
    return True


def _check_activation(activation: object) -> None:
    if not isinstance(activation, Activation):
        raise _refused("activation", activation, "an Activation")
    try:
        resolved = Activation.of(activation.name, **activation.parameters)
    except ValueError as error:
        raise SpecError(str(error)) from None
    if resolved != activation:
        raise _refused("activation", activation, f"the result of Activation.of({activation.name!r}, ...)")


@dataclass(frozen=True, slots=True, kw_only=True)
class Shape:
    """One MoE layer as the model defines it, before any split over GPUs."""

    num_experts: int
    top_k: int
    hidden_size: int  # H: what an expert reads and writes (the latent size where the model has one)
    intermediate_size: int  # I

    def __post_init__(self) -> None:
        _check_sizes(self.num_experts, self.top_k, self.hidden_size, self.intermediate_size)


@dataclass(frozen=True, slots=True, kw_only=True)
class Parallel:
    """A split over GPUs: tp divides the intermediate size, ep divides the experts."""

    tp: int = 1
    ep: int = 1

    def __post_init__(self) -> None:
        _check_int("tp", self.tp)
        _check_int("ep", self.ep)


@dataclass(frozen=True, slots=True, kw_only=True)
class VariantSpec:
    """One layer on one GPU: I and the local experts are those of the shard."""

    num_experts: int  # E, global
    local_experts: int
    top_k: int
    hidden_size: int
    intermediate_size: int
    dtype: str  # bfloat16 | float16 | float32
    quant: str = "none"  # a name that Scheme.parse reads
    activation: Activation = _SILU
    bias: bool = False

    def __post_init__(self) -> None:
        _check_sizes(self.num_experts, self.top_k, self.hidden_size, self.intermediate_size)
        _check_int("local_experts", self.local_experts, self.num_experts, "num_experts")
        _check_choice("dtype", self.dtype, DTYPES)
        _check_scheme("quant", self.quant)
        _check_activation(self.activation)
        _check_type("bias", self.bias, bool, "true or false")

    @property
    def scheme(self) -> Scheme:
        """How the weights are stored and the activations quantised."""
        return Scheme.parse(self.quant)

    @property
    def gated(self) -> bool:
        """Whether w13 holds gate rows and up rows."""
        return self.activation.gated

    @property
    def w13_shape(self) -> tuple[int, int, int]:
        """[local experts, 2I (I if not gated), H], counted in values, not in packed bytes."""
        rows = 2 * self.intermediate_size if self.gated else self.intermediate_size
        return self.local_experts, rows, self.hidden_size

    @property
    def w2_shape(self) -> tuple[int, int, int]:
        """[local experts, H, I], counted in values, not in packed bytes."""
        return self.local_experts, self.hidden_size, self.intermediate_size

    @property
    def slug(self) -> str:
        """Name for files and configs: `e128_k8_h2048_i768_bf16_silu`, or `e32of256_k8_...` with local experts."""
        experts = f"e{self.num_experts}"
        if self.local_experts != self.num_experts:
            experts = f"e{self.local_experts}of{self.num_experts}"
        parts = [experts, f"k{self.top_k}", f"h{self.hidden_size}", f"i{self.intermediate_size}"]
        parts.append(_SHORT_DTYPE[self.dtype])
        if self.quant != "none":
            parts.append(self.scheme.slug)
        parts.append(self.activation.slug)
        if self.bias:
            parts.append("bias")
        return "_".join(parts)


@dataclass(frozen=True, slots=True, kw_only=True)
class MoESpec:
    """Shapes x parallel splits x dtypes x quant modes that one package holds; one activation and one bias form."""

    name: str
    shapes: tuple[Shape, ...]
    dtypes: tuple[str, ...] = ("bfloat16",)
    quant: tuple[str, ...] = ("none",)
    activation: Activation = _SILU
    bias: bool = False
    parallel: tuple[Parallel, ...] = (Parallel(),)

    def __post_init__(self) -> None:
        if not isinstance(self.name, str) or not _NAME.fullmatch(self.name):
            allowed = "lower-case letters, digits, dashes, dots and underscores, the first a letter or digit"
            raise _refused("name", self.name, allowed)
        _check_items("shapes", self.shapes, lambda path, item: _check_type(path, item, Shape, "a Shape"))
        _check_items("dtypes", self.dtypes, lambda path, item: _check_choice(path, item, DTYPES))
        _check_items("quant", self.quant, _check_scheme)
        _check_activation(self.activation)
        _check_type("bias", self.bias, bool, "true or false")
        _check_items("parallel", self.parallel, lambda path, item: _check_type(path, item, Parallel, "a Parallel"))
        for (s, shape), (p, split) in product(enumerate(self.shapes), enumerate(self.parallel)):
            _check_divides(f"parallel[{p}].tp", split.tp, f"shapes[{s}].intermediate_size", shape.intermediate_size)
            _check_divides(f"parallel[{p}].ep", split.ep, f"shapes[{s}].num_experts", shape.num_experts)
        if len(self.quant) > 1:
            _check_told_apart(self.variants(), self.quant)

    @property
    def slug(self) -> str:
        """The name as a Python identifier part: `qwen3_30b_a3b`."""
        return self.name.replace("-", "_").replace(".", "_")

    def variants(self) -> tuple[VariantSpec, ...]:
        """All layers of the package, in the order shapes x parallel x dtypes x quant, each shard once."""
        return tuple(
            dict.fromkeys(
                VariantSpec(
                    num_experts=shape.num_experts,
                    local_experts=shape.num_experts // split.ep,
                    top_k=shape.top_k,
                    hidden_size=shape.hidden_size,
                    intermediate_size=shape.intermediate_size // split.tp,
                    dtype=dtype,
                    quant=Scheme.parse(quant).name,
                    activation=self.activation,
                    bias=self.bias,
                )
                for shape, split, dtype, quant in product(self.shapes, self.parallel, self.dtypes, self.quant)
            )
        )

    @classmethod
    def from_dict(cls, data: object, where: str = "spec") -> "MoESpec":
        """Build a spec from plain YAML or JSON types; `where` (a file name, say) opens every message.

        Raises SpecError for unknown or missing keys, wrong types and values out of range.
        """
        try:
            values = take_fields(cls, data, "")
            for key in ("dtypes", "quant"):
                if key in values:
                    values[key] = tuple(_list(values[key], key))
            if "activation" in values:
                values["activation"] = parse_activation(values["activation"], "activation")
            for key, kind in (("shapes", Shape), ("parallel", Parallel)):
                if key in values:
                    items = enumerate(_list(values[key], key))
                    values[key] = tuple(_build(kind, item, f"{key}[{index}]") for index, item in items)
            return cls(**values)
        except SpecError as error:
            raise SpecError(f"{where}: {error}") from None

    def to_dict(self) -> dict[str, Any]:
        """Every field in plain types, so that `MoESpec.from_dict(spec.to_dict()) == spec`."""
        return {
            "name": self.name,
            "shapes": [asdict(shape) for shape in self.shapes],
            "dtypes": list(self.dtypes),
            "quant": list(self.quant),
            "activation": plain_activation(self.activation),
            "bias": self.bias,
            "parallel": [asdict(split) for split in self.parallel],
        }


def load_spec(path: str | Path) -> MoESpec:
    """Read a spec file in YAML. Raises SpecError that names the file, and the line of a YAML error."""
    return MoESpec.from_dict(read_yaml(path), str(path))


def read_yaml(path: str | Path) -> object:
    """Parse one YAML file into plain types; SpecError for a file that cannot be read or parsed."""
    try:
        return yaml.safe_load(Path(path).read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise SpecError(f"{path}: no such file") from None
    except (OSError, UnicodeDecodeError) as error:
        raise SpecError(f"{path}: cannot be read: {error}") from error
    except yaml.YAMLError as error:
        mark = getattr(error, "problem_mark", None)
        line = f":{mark.line + 1}" if mark is not None else ""
        raise SpecError(f"{path}{line}: not valid YAML: {getattr(error, 'problem', None) or error}") from error


def parse_activation(value: object, path: str) -> Activation:
    """Read `silu` or `{name: swigluoai, limit: 7.0}`; `path` replaces the leading `activation` of messages."""
    if isinstance(value, str):
        value = {"name": value}
    if not isinstance(value, Mapping) or not isinstance(value.get("name"), str):
        raise _refused(path, value, "a name, or a mapping with name and its parameters")
    parameters = {str(key): number for key, number in value.items() if key != "name"}
    try:
        return Activation.of(value["name"], **parameters)
    except ValueError as error:
        raise SpecError(path + str(error).removeprefix("activation")) from None


def plain_activation(activation: Activation) -> str | dict[str, Any]:
    """The inverse of `parse_activation`: a name, or a mapping when parameters are on."""
    if not activation.parameters:
        return activation.name
    return {"name": activation.name, **activation.parameters}


def take_fields(kind: type, data: object, path: str) -> dict[str, Any]:
    """Check that `data` is a mapping with the fields of the dataclass `kind`, none unknown, none missing."""
    allowed = [field.name for field in fields(kind)]
    if not isinstance(data, Mapping):
        prefix = f"{path}: " if path else ""
        raise SpecError(f"{prefix}{data!r} is not allowed; allowed: a mapping with {', '.join(allowed)}")
    dot = f"{path}." if path else ""
    for key in data:
        if key not in allowed:
            raise SpecError(f"{dot}{key}: unknown key (value {data[key]!r}); allowed: {', '.join(allowed)}")
    for field in fields(kind):
        if field.default is MISSING and field.default_factory is MISSING and field.name not in data:
            raise SpecError(f"{dot}{field.name}: missing; given: {', '.join(map(str, data)) or 'nothing'}")
    return dict(data)


def _build(kind: type, data: object, path: str) -> object:
    values = take_fields(kind, data, path)
    try:
        return kind(**values)
    except SpecError as error:
        raise SpecError(f"{path}.{error}") from None


def _list(value: object, path: str) -> list[Any]:
    if not isinstance(value, list):
        raise _refused(path, value, "a list")
    return value
