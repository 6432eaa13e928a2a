"""Package: what an emitted package does when it is called. `_dispatch.py` of the package gives it its public face."""

from collections.abc import Iterator, Sequence
from pathlib import Path

import torch

from .checks import LayerIndex, check_call
from .configs import Configs
from .device import DeviceFacts, device_facts
from .layer import Call, Layer, launch_key, run
from .reference import moe_reference
from .tile import LayerTiles

OP_SCHEMA = (
    "fused_experts(Tensor hidden_states, Tensor w13, Tensor w2, Tensor topk_weights, Tensor topk_ids, "
    "Tensor? w13_bias, Tensor? w2_bias, Tensor? expert_map, int global_num_experts, "
    "bool apply_router_weight_on_input) -> Tensor"
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
        w13: torch.Tensor,
        w2: torch.Tensor,
        topk_weights: torch.Tensor,
        topk_ids: torch.Tensor,
        w13_bias: torch.Tensor | None,
        w2_bias: torch.Tensor | None,
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
            w13_bias,
            w2_bias,
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
        device = device_facts(torch.cuda.current_device())
        tiles = self._configs.tiles(layer, tokens, call.expert_map, device)
        key = (layer.slug, tokens, device, *_variant(call))
        if key in self._seen:
            run(layer, call, tiles)
            return
        compiled = self._compiled_key(layer, call, tiles)
        if compiled not in self._compiled and torch.cuda.is_current_stream_capturing():
            raise RuntimeError(
                f"{layer.slug}: the kernels for {tokens} tokens are not compiled yet, and compiling would break the "
                f"capture; call warmup({tokens}) or run the layer once before capturing a CUDA graph"
            )
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
                    yield _padding_call(layer, tokens, remote, memory), tiles


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
    library.impl("fused_experts", lambda *args: holder.moegen_package.fused_experts(*args), "CompositeExplicitAutograd")
    torch.library.register_fake(f"{namespace}::fused_experts", _fake, lib=library)
    holder.moegen_library = library  # torch drops the op with its library, and modules of a package may come and go
    return library


def _fake(hidden_states: torch.Tensor, *_: object) -> torch.Tensor:
    return torch.empty_like(hidden_states, memory_format=torch.contiguous_format)


def _variant(call: Call) -> tuple[object, ...]:
    """What of a call, besides the token count, selects other compiled kernels."""
    return (call.expert_map is None, call.topk_ids.dtype, call.apply_router_weight_on_input)


def _run_reference(layer: Layer, call: Call) -> None:
    result = moe_reference(
        call.hidden_states,
        call.w13,
        call.w2,
        call.topk_weights,
        call.topk_ids,
        layer.activation,
        w13_bias=call.w13_bias,
        w2_bias=call.w2_bias,
        expert_map=call.expert_map,
        apply_router_weight_on_input=call.apply_router_weight_on_input,
        compute_dtype=torch.float32,
    )
    call.out.copy_(result)


def _padding_call(layer: Layer, tokens: int, expert_map: torch.Tensor | None, memory: str) -> Call:
    shape = (tokens, layer.top_k)
    weights = [torch.empty(shape, dtype=layer.dtype, device="meta") for shape in (layer.w13_shape, layer.w2_shape)]
    biases = [w.new_empty(w.shape[:2]) if layer.bias else None for w in weights]
    hidden_states = torch.empty((tokens, layer.hidden_size), dtype=layer.dtype, device=memory)
    return Call(
        hidden_states,
        weights[0],
        weights[1],
        torch.ones(shape, dtype=torch.float32, device=memory),
        torch.full(shape, -1, dtype=torch.int32, device=memory),
        biases[0],
        biases[1],
        expert_map,
        False,
        torch.empty_like(hidden_states),
    )
