"""Package: what an emitted package does when it is called. `_dispatch.py` of the package gives it its public face."""

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch

from .checks import LayerIndex, check_call, check_device
from .configs import Configs
from .descriptors import readable_by_tma
from .device import DeviceFacts, device_facts
from .layer import Call, Layer, launch_key, run
from .reference import moe_reference
from .tile import LayerTiles
from .weight import PARTS, Weight, named_tensors

_WEIGHT_ARGUMENTS = ", ".join(
    f"Tensor {w}, " + ", ".join(f"Tensor? {w}_{part}" for part in PARTS) for w in ("w13", "w2")
)
OP_SCHEMA = (
    f"fused_experts(Tensor hidden_states, {_WEIGHT_ARGUMENTS}, Tensor topk_weights, Tensor topk_ids, "
    "Tensor? expert_map, int global_num_experts, bool apply_router_weight_on_input) -> Tensor"
)


class Package:
    """The layers of one emitted package with their configs and the record of what is compiled."""

    def __init__(self, folder: Path, layers: Sequence[Layer]) -> None:
        self.layers = tuple(layers)
        self._index = LayerIndex(self.layers)
        self._configs = Configs(folder / "configs")
        self._seen: set[tuple[object, ...]] = set()
        self._compiled: set[tuple[object, ...]] = set()

    def fused_experts(
        self,
        hidden_states: torch.Tensor,
        w13: Weight,
        w2: Weight,
        topk_weights: torch.Tensor,
        topk_ids: torch.Tensor,
        expert_map: torch.Tensor | None,
        global_num_experts: int,
        apply_router_weight_on_input: bool,
        out: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """Check, choose tile configs, launch; CPU tensors run the torch reference in float32."""
        layer, call = check_call(
            self._index,
            hidden_states,
            w13,
            w2,
            topk_weights,
            topk_ids,
            expert_map,
            global_num_experts,
            apply_router_weight_on_input,
            out,
        )
        if hidden_states.shape[0] == 0:
            return call.out
        if hidden_states.device.type == "cpu":
            _run_reference(layer, call)
        elif hidden_states.device.index == torch.cuda.current_device():
            self._run(layer, call)
        else:
            with torch.cuda.device(hidden_states.device):
                self._run(layer, call)
        return call.out

    def run_op(self, hidden_states: torch.Tensor, *rest: Any) -> torch.Tensor:  # noqa: ANN401 - OP_SCHEMA has the types
        """`fused_experts` with the flat arguments of OP_SCHEMA."""
        count = 1 + len(PARTS)
        w13, w2 = Weight(*rest[:count]), Weight(*rest[count : 2 * count])
        return self.fused_experts(hidden_states, w13, w2, *rest[2 * count :])

    def warmup(self, max_tokens: int, device: torch.device | str | int | None = None) -> None:
        """Compile and load every kernel that a call of 1..max_tokens tokens can need on one GPU.

        `device` is the current one by default. Weights are taken to be contiguous; nothing of them is read. Raises
        ValueError for max_tokens < 1 and RuntimeError without a GPU.
        """
        if isinstance(max_tokens, bool) or not isinstance(max_tokens, int) or max_tokens < 1:
            raise ValueError(f"max_tokens: {max_tokens!r} is not allowed; allowed: an integer from 1")
        if not torch.cuda.is_available():
            raise RuntimeError("warmup: no GPU is available; CPU tensors need no warm-up")
        index = torch.device("cuda" if device is None else device).index
        with torch.cuda.device(torch.cuda.current_device() if index is None else index):
            device_now = device_facts(torch.cuda.current_device())
            for layer in self.layers:
                for call, _ in self.distinct_calls(layer, max_tokens, device_now, "cuda"):
                    self._run(layer, call)
            torch.cuda.synchronize()

    def _run(self, layer: Layer, call: Call) -> None:
        tokens = call.hidden_states.shape[0]
        index = torch.cuda.current_device()
        device = device_facts(index)
        tiles = self._configs.tiles(layer, tokens, call.expert_map, device)
        if tiles.gemm1.family != "portable" and not readable_by_tma(call):
            tiles = self._configs.tiles(layer, tokens, call.expert_map, device, portable=True)
        key = (layer.slug, tokens, index, tiles.gemm1.family, *_variant(call))
        if key in self._seen:
            run(layer, call, tiles)
            return
        check_device(layer.scheme, device)
        compiled = self._compiled_key(layer, call, tiles)
        if compiled not in self._compiled and torch.cuda.is_current_stream_capturing():
            raise RuntimeError(_not_compiled(layer, call, device))
        run(layer, call, tiles)
        self._compiled.add(compiled)
        self._seen.add(key)

    def _compiled_key(self, layer: Layer, call: Call, tiles: LayerTiles) -> tuple[object, ...]:
        tokens = call.hidden_states.shape[0]
        return (
            layer.slug,
            torch.cuda.current_device(),
            *_variant(call),
            launch_key(layer, tokens, tiles, call.expert_map),
        )

    def distinct_calls(
        self, layer: Layer, max_tokens: int, device: DeviceFacts, memory: str
    ) -> Iterator[tuple[Call, LayerTiles]]:
        """One call for each set of kernels that calls of 1..max_tokens tokens can launch on `device`.

        Their slots are all padding, so they launch everything and read no weight; `memory` is the torch device of
        their tensors ("meta" when nothing will be launched).
        """
        for sharded in (False, True) if layer.local_experts < layer.num_experts else (False,):
            remote = torch.full((layer.num_experts,), -1, dtype=torch.int32, device=memory) if sharded else None
            known = set()
            for tokens in range(1, max_tokens + 1):
                tiles = self._configs.tiles(layer, tokens, remote, device)
                key = launch_key(layer, tokens, tiles, remote)
                if key not in known:
                    known.add(key)
                    yield _padding_call(layer, tokens, remote, memory, device), tiles


def register_op(namespace: str, package: Package) -> torch.library.Library | None:
    """Register `namespace::fused_experts`, opaque to torch.compile, for the rest of the process.

    Copies of one package share the op (a namespace holds the package's hash): it runs the copy that was imported last.
    None when another copy has registered it already.
    """
    holder = getattr(torch.ops, namespace)
    known = hasattr(holder, "fused_experts")
    holder.moegen_package = package
    if known:
        return None
    library = torch.library.Library(namespace, "FRAGMENT")
    library.define(OP_SCHEMA)
    library.impl("fused_experts", lambda *args: holder.moegen_package.run_op(*args), "CompositeExplicitAutograd")
    torch.library.register_fake(f"{namespace}::fused_experts", _fake, lib=library)
    holder.moegen_library = library  # torch drops the op with its library, and modules of a package may come and go
    return library


def _fake(hidden_states: torch.Tensor, *_: object) -> torch.Tensor:
    return torch.empty_like(hidden_states, memory_format=torch.contiguous_format)


def _variant(call: Call) -> tuple[object, ...]:
    """What of a call, besides the token count, selects other compiled kernels."""
    weights = (call.w13, call.w2)
    parts = [_kind(getattr(w, part)) for w in weights for part in PARTS]
    aligned = [_alignment(t) for t in (call.hidden_states, call.w13.values, call.w2.values, call.out)]
    routing = (call.expert_map is None, call.topk_ids.dtype, call.apply_router_weight_on_input)
    return (*routing, *(w.values.dtype for w in weights), *parts, *aligned)


_VARIANT_PARTS = (
    *("expert_map", "topk_ids", "apply_router_weight_on_input", "w13", "w2"),
    *(f"{weight}_{part}" for weight in ("w13", "w2") for part in PARTS),
    *("hidden_states", "w13", "w2", "out"),
)


def _not_compiled(layer: Layer, call: Call, device: DeviceFacts) -> str:
    """What to do before a capture: warm-up compiles the usual form of the arguments, others have to be run once."""
    tokens = call.hidden_states.shape[0]
    usual = _variant(_padding_call(layer, 1, call.expert_map, "meta", device))
    unusual = [name for name, own, other in zip(_VARIANT_PARTS, _variant(call), usual, strict=True) if own != other]
    advice = f"call warmup({tokens}) or run the layer once"
    if unusual:
        names = ", ".join(dict.fromkeys(unusual))
        advice = (
            f"warmup({tokens}) compiles for the usual type and alignment of {names}, so run the layer once with these"
        )
    return (
        f"{layer.slug}: the kernels for {tokens} tokens are not compiled yet, and compiling would break the capture; "
        f"{advice} before capturing a CUDA graph"
    )


def _alignment(tensor: torch.Tensor) -> tuple[bool, ...]:
    """Triton compiles other code, with narrower loads, where an address or a stride is not a multiple of 16."""
    return (tensor.data_ptr() % 16 == 0, *(stride % 16 == 0 for stride in tensor.stride()[:-1]))


def _kind(part: torch.Tensor | None) -> tuple[torch.dtype, bool] | None:
    if part is None:
        return None
    dtype = torch.uint8 if part.dtype == torch.float8_e8m0fnu else part.dtype  # kernels read the byte
    return dtype, part.data_ptr() % 16 == 0


def _run_reference(layer: Layer, call: Call) -> None:
    result = moe_reference(
        hidden_states=call.hidden_states,
        topk_weights=call.topk_weights,
        topk_ids=call.topk_ids,
        activation=layer.activation,
        scheme=layer.scheme,
        expert_map=call.expert_map,
        apply_router_weight_on_input=call.apply_router_weight_on_input,
        compute_dtype=torch.float32,
        **named_tensors("w13", call.w13),
        **named_tensors("w2", call.w2),
    )
    call.out.copy_(result)


def _padding_call(layer: Layer, tokens: int, expert_map: torch.Tensor | None, memory: str, device: DeviceFacts) -> Call:
    shape = (tokens, layer.top_k)
    hidden_states = torch.empty((tokens, layer.hidden_size), dtype=layer.dtype, device=memory)
    return Call(
        hidden_states,
        _unread_weight(layer, layer.w13_shape, device),
        _unread_weight(layer, layer.w2_shape, device),
        torch.ones(shape, dtype=torch.float32, device=memory),
        torch.full(shape, -1, dtype=torch.int32, device=memory),
        expert_map,
        False,
        torch.empty_like(hidden_states),
    )


def _unread_weight(layer: Layer, shape: tuple[int, int, int], device: DeviceFacts) -> Weight:
    """A weight without memory, for launches that read none of it; of the types that checkpoints for `device` have."""
    scheme = layer.scheme
    stored = scheme.weight_dtypes
    if device.arch == "gfx942" and "float8_e4m3fnuz" in stored:
        stored = ("float8_e4m3fnuz",)

    def meta(size: tuple[int, ...] | None, dtypes: tuple[str, ...]) -> torch.Tensor | None:
        dtype = layer.dtype if not dtypes or "activation" in dtypes else getattr(torch, dtypes[0])
        return None if size is None else torch.empty(size, dtype=dtype, device="meta")

    values = meta(scheme.weight_shape(*shape), stored)
    assert values is not None  # noqa: S101 - only optional parts have no shape
    return Weight(
        values,
        meta(scheme.scale_shape(*shape), scheme.scale_dtypes),
        meta(scheme.zeros_shape(*shape), ("uint8",)),
        meta(shape[:1] if scheme.has_global_scale else None, ("float32",)),
        None,
        meta(shape[:2] if layer.bias else None, ()),
    )
