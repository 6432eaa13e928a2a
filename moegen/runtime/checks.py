"""Argument checks: every error names the argument, its value and what is allowed, before any launch."""

from collections.abc import Callable, Sequence

import torch

from .layer import Call, Layer


class LayerIndex:
    """Finds the layer that a call's shapes and dtype belong to, in one dictionary look-up."""

    def __init__(self, layers: Sequence[Layer]) -> None:
        self.layers = tuple(layers)
        self._known: dict[tuple[object, ...], Layer] = {}
        for layer in self.layers:
            shapes = (layer.dtype, layer.w13_shape, layer.w2_shape, layer.top_k)
            self._known.setdefault((*shapes, layer.num_experts), layer)
            self._known.setdefault((*shapes, None), layer)

    def find(self, call_shapes: tuple[object, ...], num_mapped: int | None) -> Layer | None:
        """`call_shapes` = (dtype, w13 shape, w2 shape, top_k); num_mapped = length of the expert_map, if any."""
        return self._known.get((*call_shapes, num_mapped))


def check_call(
    index: LayerIndex,
    hidden_states: torch.Tensor,
    w13: torch.Tensor,
    w2: torch.Tensor,
    topk_weights: torch.Tensor,
    topk_ids: torch.Tensor,
    w13_bias: torch.Tensor | None,
    w2_bias: torch.Tensor | None,
    expert_map: torch.Tensor | None,
    global_num_experts: int,
    apply_router_weight_on_input: bool,
    out: torch.Tensor | None,
) -> tuple[Layer, Call]:
    """The layer that these arguments belong to and the checked call, `out` allocated if it was not given.

    TypeError for something that is no tensor or has the wrong dtype, ValueError for a shape, device, stride or value.
    """
    _check_tensors(hidden_states=hidden_states, w13=w13, w2=w2, topk_weights=topk_weights, topk_ids=topk_ids)
    mapped = None
    if expert_map is not None:
        _check_tensors(expert_map=expert_map)
        mapped = expert_map.numel()
    shapes = (hidden_states.dtype, tuple(w13.shape), tuple(w2.shape), topk_ids.shape[-1] if topk_ids.dim() else 0)
    layer = index.find(shapes, mapped)
    if layer is None:
        raise _no_layer(index.layers, hidden_states, w13, w2, topk_ids, mapped)
    if hidden_states.device.type not in ("cpu", "cuda"):
        raise ValueError(f"hidden_states: device {hidden_states.device} is not allowed; allowed: cuda or cpu")
    if hidden_states.dim() != 2:
        raise ValueError(f"hidden_states: dimensions {hidden_states.dim()} is not allowed; allowed: 2")
    tokens = hidden_states.shape[0]
    _check("hidden_states", hidden_states, layer.dtype, (tokens, layer.hidden_size), hidden_states)
    _check("w13", w13, layer.dtype, None, hidden_states)
    _check("w2", w2, layer.dtype, None, hidden_states)
    _check("topk_weights", topk_weights, torch.float32, (tokens, layer.top_k), hidden_states, contiguous=True)
    _check("topk_ids", topk_ids, (torch.int32, torch.int64), (tokens, layer.top_k), hidden_states, contiguous=True)
    _check_bias("w13_bias", w13_bias, layer, layer.w13_shape[:2], hidden_states)
    _check_bias("w2_bias", w2_bias, layer, layer.w2_shape[:2], hidden_states)
    _check_experts(layer, expert_map, global_num_experts, hidden_states)
    if apply_router_weight_on_input and layer.top_k != 1:
        raise ValueError(
            f"apply_router_weight_on_input: True is not allowed with top_k {layer.top_k}; allowed: top_k 1"
        )
    out = _check_out(out, layer, hidden_states)
    on_input = apply_router_weight_on_input
    call = Call(hidden_states, w13, w2, topk_weights, topk_ids, w13_bias, w2_bias, expert_map, on_input, out)
    return layer, call


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
    facts: list[tuple[str, str, object, Callable[[Layer], object]]] = [
        ("hidden_states", "dtype", hidden_states.dtype, lambda layer: layer.dtype),
        ("hidden_states", "dimensions", hidden_states.dim(), lambda _: 2),
        ("hidden_states", "hidden size", hidden_states.shape[-1:], lambda layer: (layer.hidden_size,)),
        ("w13", "shape", w13.shape, lambda layer: layer.w13_shape),
        ("w2", "shape", w2.shape, lambda layer: layer.w2_shape),
        ("topk_ids", "dimensions", topk_ids.dim(), lambda _: 2),
        ("topk_ids", "top_k", topk_ids.shape[-1:], lambda layer: (layer.top_k,)),
        ("expert_map", "length", mapped, lambda layer: layer.num_experts),
    ]
    candidates = list(layers)
    for name, what, value, wanted in facts:
        fitting = [layer for layer in candidates if wanted(layer) == value]
        if not fitting:
            allowed = " or ".join(dict.fromkeys(_plain(wanted(layer)) for layer in candidates))
            kind = TypeError if what == "dtype" else ValueError
            return kind(f"{name}: {what} {_plain(value)} is not allowed; allowed: {allowed}")
        candidates = fitting
    raise AssertionError("a layer that fits every argument was not found")


def _plain(value: object) -> str:
    if isinstance(value, tuple):
        return str(list(value)) if len(value) > 1 else str(*value)
    return str(value)


def _check_bias(name: str, bias: torch.Tensor | None, layer: Layer, shape: tuple[int, ...], like: torch.Tensor) -> None:
    if layer.bias != (bias is not None):
        given, allowed = ("missing", f"a tensor of shape {list(shape)}") if layer.bias else ("given", "None")
        raise ValueError(f"{name}: {given}, but this package is built with bias {layer.bias}; allowed: {allowed}")
    if bias is not None:
        _check_tensors(**{name: bias})
        _check(name, bias, (layer.dtype, torch.float32), shape, like, contiguous=True)


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
