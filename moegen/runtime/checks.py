"""Argument checks: every error names the argument, its value and what is allowed, before any launch."""

from collections.abc import Callable, Collection, Sequence
from itertools import product

import torch

from .device import DeviceFacts
from .layer import Call, Layer
from .quant import Scheme
from .weight import Weight


class LayerIndex:
    """Finds the layer that a call's shapes and dtypes belong to, in one dictionary look-up."""

    def __init__(self, layers: Sequence[Layer]) -> None:
        self.layers = tuple(layers)
        self._known: dict[tuple[object, ...], list[Layer]] = {}
        for layer in self.layers:
            for dtype, mapped in product(layer.scheme.weight_dtypes or [None], (layer.num_experts, None)):
                stored = layer.dtype if dtype is None else getattr(torch, dtype)
                shapes = (stored_shape(layer, layer.w13_shape), stored_shape(layer, layer.w2_shape))
                self._known.setdefault((layer.dtype, stored, *shapes, layer.top_k, mapped), []).append(layer)

    def find(
        self, hidden_states: torch.Tensor, w13: Weight, w2: Weight, topk_ids: torch.Tensor, mapped: int | None
    ) -> Layer | None:
        """The layer of these arguments; `mapped` is the length of the expert_map, if any."""
        shapes = (tuple(w13.values.shape), tuple(w2.values.shape), topk_ids.shape[-1] if topk_ids.dim() else 0)
        found = self._known.get((hidden_states.dtype, w13.values.dtype, *shapes, mapped), [])
        for layer in found if len(found) > 1 else []:  # one alone needs no telling apart, only the checks that follow
            if _extras_fit(layer, w13, layer.w13_shape) and _extras_fit(layer, w2, layer.w2_shape):
                return layer
        return found[0] if found else None


def stored_shape(layer: Layer, shape: tuple[int, int, int]) -> tuple[int, int, int]:
    """Shape of a weight as its quant scheme stores it."""
    return layer.scheme.weight_shape(*shape)


def check_call(
    index: LayerIndex,
    hidden_states: torch.Tensor,
    w13: Weight,
    w2: Weight,
    topk_weights: torch.Tensor,
    topk_ids: torch.Tensor,
    expert_map: torch.Tensor | None,
    global_num_experts: int,
    apply_router_weight_on_input: bool,
    out: torch.Tensor | None,
) -> tuple[Layer, Call]:
    """The layer that these arguments belong to and the checked call, `out` allocated if it was not given.

    TypeError for something that is no tensor or has the wrong dtype, ValueError for a shape, device, stride or value.
    """
    x = hidden_states
    _check_tensors(hidden_states=x, w13=w13.values, w2=w2.values, topk_weights=topk_weights, topk_ids=topk_ids)
    mapped = None
    if expert_map is not None:
        _check_tensors(expert_map=expert_map)
        mapped = expert_map.numel()
    layer = index.find(x, w13, w2, topk_ids, mapped)
    if layer is None:
        raise _no_layer(index.layers, x, w13.values, w2.values, topk_ids, mapped)
    if x.device.type not in ("cpu", "cuda"):
        raise ValueError(f"hidden_states: device {x.device} is not allowed; allowed: cuda or cpu")
    if x.dim() != 2:
        raise ValueError(f"hidden_states: dimensions {x.dim()} is not allowed; allowed: 2")
    tokens = x.shape[0]
    _check("hidden_states", x, layer.dtype, (tokens, layer.hidden_size), x)
    _check("topk_weights", topk_weights, torch.float32, (tokens, layer.top_k), x, contiguous=True)
    _check("topk_ids", topk_ids, (torch.int32, torch.int64), (tokens, layer.top_k), x, contiguous=True)
    w13 = _check_weight("w13", w13, layer, layer.w13_shape, x)
    w2 = _check_weight("w2", w2, layer, layer.w2_shape, x)
    _check_experts(layer, expert_map, global_num_experts, x)
    if apply_router_weight_on_input and layer.top_k != 1:
        raise ValueError(
            f"apply_router_weight_on_input: True is not allowed with top_k {layer.top_k}; allowed: top_k 1"
        )
    out = _check_out(out, layer, x)
    return layer, Call(x, w13, w2, topk_weights, topk_ids, expert_map, apply_router_weight_on_input, out)


def check_device(scheme: Scheme, device: DeviceFacts) -> None:
    """ValueError when kernels of `scheme` do not exist on `device`, instead of a message from inside the compiler."""
    if scheme.uses_float8 and not device.has_float8:
        raise ValueError(
            f"hidden_states: {device.name} (compute capability {device.arch}) is not allowed with {scheme.name}; "
            "allowed: 8.9 and newer, which have e4m3 values"
        )


def _check_tensors(**tensors: object) -> None:
    for name, value in tensors.items():
        if not isinstance(value, torch.Tensor):
            raise TypeError(f"{name}: {type(value).__name__} is not allowed; allowed: torch.Tensor")


def _check(
    name: str,
    value: torch.Tensor,
    dtype: torch.dtype | tuple[torch.dtype, ...],
    shape: tuple[int, ...] | None,
    like: torch.Tensor,
    contiguous: bool = False,
) -> None:
    dtypes = dtype if isinstance(dtype, tuple) else (dtype,)
    if value.dtype not in dtypes:
        raise TypeError(f"{name}: dtype {value.dtype} is not allowed; allowed: {' or '.join(map(str, dtypes))}")
    if shape is not None and value.shape != shape:
        raise ValueError(f"{name}: shape {list(value.shape)} is not allowed; allowed: {list(shape)}")
    if value.device != like.device:
        raise ValueError(f"{name}: device {value.device} is not allowed; allowed: {like.device}, that of hidden_states")
    if contiguous and not value.is_contiguous():
        raise ValueError(f"{name}: strides {value.stride()} are not allowed; allowed: a contiguous tensor")
    if value.shape[-1] > 1 and value.stride(-1) != 1:
        raise ValueError(f"{name}: last stride {value.stride(-1)} is not allowed; allowed: 1")


def _no_layer(
    layers: Sequence[Layer],
    hidden_states: torch.Tensor,
    w13: torch.Tensor,
    w2: torch.Tensor,
    topk_ids: torch.Tensor,
    mapped: int | None,
) -> Exception:
    """The error about the first argument that fits no layer of this package which fits the arguments before it."""
    facts: list[tuple[str, str, object, Callable[[Layer], Collection[object]]]] = [
        ("hidden_states", "dtype", hidden_states.dtype, lambda layer: [layer.dtype]),
        ("hidden_states", "dimensions", hidden_states.dim(), lambda _: [2]),
        ("hidden_states", "hidden size", hidden_states.shape[-1:], lambda layer: [(layer.hidden_size,)]),
        ("w13", "dtype", w13.dtype, _weight_dtypes),
        ("w13", "shape", w13.shape, lambda layer: [stored_shape(layer, layer.w13_shape)]),
        ("w2", "shape", w2.shape, lambda layer: [stored_shape(layer, layer.w2_shape)]),
        ("topk_ids", "dimensions", topk_ids.dim(), lambda _: [2]),
        ("topk_ids", "top_k", topk_ids.shape[-1:], lambda layer: [(layer.top_k,)]),
        ("expert_map", "length", mapped, lambda layer: [layer.num_experts]),
    ]
    candidates = list(layers)
    for name, what, value, wanted in facts:
        fitting = [layer for layer in candidates if value in wanted(layer)]
        if not fitting:
            allowed = " or ".join(dict.fromkeys(_plain(item) for layer in candidates for item in wanted(layer)))
            kind = TypeError if what == "dtype" else ValueError
            return kind(f"{name}: {what} {_plain(value)} is not allowed; allowed: {allowed}")
        candidates = fitting
    raise AssertionError("a layer that fits every argument was not found")


def _plain(value: object) -> str:
    if isinstance(value, tuple):
        return str(list(value)) if len(value) > 1 else str(*value)
    return str(value)


def _weight_dtypes(layer: Layer) -> list[torch.dtype]:
    return [getattr(torch, name) for name in layer.scheme.weight_dtypes] or [layer.dtype]


def _scale_dtypes(layer: Layer) -> tuple[torch.dtype, ...]:
    names = layer.scheme.scale_dtypes
    return tuple(layer.dtype if name == "activation" else getattr(torch, name) for name in names)


def _extras_fit(layer: Layer, weight: Weight, shape: tuple[int, int, int]) -> bool:
    """Whether scale and zero points are those of the layer's scheme: tells schemes apart that store weights alike.

    MoESpec refuses two schemes for which this is true of the same tensors.
    """
    scheme, scale = layer.scheme, weight.scale
    if (weight.zeros is None) != (scheme.zeros_shape(*shape) is None):
        return False
    expected = scheme.scale_shape(*shape)
    if not isinstance(scale, torch.Tensor) or expected is None:
        return scale is None and expected is None
    return scale.dtype in _scale_dtypes(layer) and _squeezed(scale, expected).shape == expected


def _squeezed(scale: torch.Tensor, shape: tuple[int, ...]) -> torch.Tensor:
    """[E, rows, 1] as [E, rows], which some checkpoints store."""
    return scale.squeeze(-1) if scale.dim() == len(shape) + 1 and scale.shape[-1] == 1 else scale


def _check_weight(name: str, weight: Weight, layer: Layer, shape: tuple[int, int, int], like: torch.Tensor) -> Weight:
    scheme = layer.scheme
    experts, rows, _ = shape
    _check(name, weight.values, tuple(_weight_dtypes(layer)), stored_shape(layer, shape), like)
    names = ("2I" if layer.activation.gated else "I", "H") if name == "w13" else ("H", "I")
    scale = weight.scale
    expected = scheme.scale_shape(*shape)
    if scale is not None and expected is not None:
        _check_tensors(**{f"{name}_scale": scale})
        scale = _squeezed(scale, expected)
    _check_extra(f"{name}_scale", scale, _scale_dtypes(layer), expected, lambda: scheme.words(names), like)
    zeros = scheme.zeros_shape(*shape)
    _check_extra(f"{name}_zeros", weight.zeros, (torch.uint8,), zeros, lambda: scheme.zeros_words(names), like)
    per_expert = (experts,) if scheme.has_global_scale else None
    _check_extra(f"{name}_global_scale", weight.global_scale, (torch.float32,), per_expert, lambda: "[E]", like)
    given = weight.input_scale
    if given is not None:
        _check_tensors(**{f"{name}_input_scale": given})
        if scheme.kind != "tensor" or scheme.row.activation is None:
            raise ValueError(f"{name}_input_scale: given, but {scheme.name} has no static scale; allowed: None")
        given = given.reshape(-1)
        _check(f"{name}_input_scale", given, torch.float32, (1,), like)
    bias_shape = (experts, rows) if layer.bias else None
    _check_extra(
        f"{name}_bias", weight.bias, (layer.dtype, torch.float32), bias_shape, lambda: f"[E, {names[0]}]", like
    )
    return Weight(weight.values, scale, weight.zeros, weight.global_scale, given, weight.bias)


def _check_extra(
    name: str,
    value: torch.Tensor | None,
    dtypes: tuple[torch.dtype, ...],
    shape: tuple[int, ...] | None,
    words: Callable[[], str],
    like: torch.Tensor,
) -> None:
    """A tensor that the layer needs (shape is given) or must not get (None); `words` are for messages alone."""
    if shape is None:
        if value is not None:
            raise ValueError(f"{name}: given, but this package is built without; allowed: None")
        return
    if value is not None:
        _check_tensors(**{name: value})
    if value is None or value.shape != shape:
        given = "missing" if value is None else f"shape {list(value.shape)} is not allowed"
        dtypes_named = " or ".join(map(str, dtypes))
        raise ValueError(f"{name}: {given}; expected {words()} = {list(shape)}, {dtypes_named}, contiguous")
    _check(name, value, dtypes, shape, like, contiguous=True)


def _check_experts(layer: Layer, expert_map: torch.Tensor | None, global_num_experts: int, like: torch.Tensor) -> None:
    if expert_map is not None:
        _check("expert_map", expert_map, torch.int32, (layer.num_experts,), like, contiguous=True)
    expected = layer.local_experts if expert_map is None else layer.num_experts
    if global_num_experts not in (-1, expected):
        origin = "the experts of w13" if expert_map is None else "the length of expert_map"
        raise ValueError(
            f"global_num_experts: {global_num_experts} is not allowed; allowed: -1 or {expected}, {origin}"
        )


def _check_out(out: torch.Tensor | None, layer: Layer, hidden_states: torch.Tensor) -> torch.Tensor:
    if out is None:
        return torch.empty_like(hidden_states, memory_format=torch.contiguous_format)
    _check_tensors(out=out)
    _check("out", out, layer.dtype, tuple(hidden_states.shape), hidden_states)
    if out.shape[0] > 1 and out.stride(0) < out.shape[1]:
        raise ValueError(f"out: row stride {out.stride(0)} is not allowed; allowed: {out.shape[1]} or more")
    if out.numel() and out.data_ptr() == hidden_states.data_ptr():
        raise ValueError("out: the memory of hidden_states is not allowed; allowed: a tensor of its own")
    return out
