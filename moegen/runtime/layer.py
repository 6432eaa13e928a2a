"""Layer: one (shape, dtype, quant scheme) of a package, and the launches that make up one call of it."""

from dataclasses import dataclass
from types import ModuleType

import torch
import triton

from .activations import Activation
from .align import align_into, align_launch_key, align_lengths, align_scratch_size
from .align_kernels import NUM_TICKETS
from .assignment import low_latency_applies
from .cooperative import run_cooperative
from .kernel_parts import pdl_option
from .quant import Scheme
from .quantise import Activations, Slots, new_room, quantise
from .reduce import reduce_launch_key, top_k_reduce
from .stream import run_stream
from .tile import Gemm, LayerTiles, TileConfig
from .weight import Weight, scale_bytes

# sorted_token_ids, expert_ids, num_tokens_post_padded; the first and the last are None for the low-latency assignment.
Assignment = tuple[torch.Tensor | None, torch.Tensor, torch.Tensor | None]


@dataclass(frozen=True, slots=True, eq=False)
class Layer:
    """One layer of a package.

    num_experts is global, local_experts those whose weights are on this GPU; intermediate_size is the shard's;
    `kernels` is the generated module with gemm1 and gemm2.
    """

    slug: str
    num_experts: int
    local_experts: int
    top_k: int
    hidden_size: int
    intermediate_size: int
    dtype: torch.dtype
    scheme: Scheme
    activation: Activation
    bias: bool
    kernels: ModuleType

    @property
    def w13_shape(self) -> tuple[int, int, int]:
        """[E, 2I, H], or [E, I, H] for an un-gated activation; in values, not in packed bytes."""
        rows = self.intermediate_size * (2 if self.activation.gated else 1)
        return (self.local_experts, rows, self.hidden_size)

    @property
    def w2_shape(self) -> tuple[int, int, int]:
        """[E, H, I] in values, not in packed bytes."""
        return (self.local_experts, self.hidden_size, self.intermediate_size)

    @property
    def quant(self) -> str:
        """Name of the quant scheme: `none`, `fp8_w8a8:128x128`."""
        return self.scheme.name

    def gemm(self, op: str) -> Gemm:
        """The facts of gemm1 or gemm2 that tile choice needs."""
        experts, rows, depth = self.w13_shape if op == "gemm1" else self.w2_shape
        size = self.dtype.itemsize
        return Gemm(
            op=op,
            num_experts=experts,
            top_k=self.top_k,
            rows=rows,
            depth=depth,
            gated=op == "gemm1" and self.activation.gated,
            a_bits=8 if self.scheme.row.activation in ("fp8", "int8") else 8 * size,
            w_bits=8 // self.scheme.row.values_per_byte if self.scheme.kind else 8 * size,
            group_k=self.scheme.group_k,
            zero_points=self.scheme.zero_points,
            group_n=self.scheme.group_n if self.scheme.kind == "NxK" else 0,
            interleaved=op == "gemm1" and self.activation.interleaved,
        )


@dataclass(frozen=True, slots=True)
class Call:
    """The checked arguments of one call; shapes as in `fused_experts`."""

    hidden_states: torch.Tensor
    w13: Weight
    w2: Weight
    topk_weights: torch.Tensor
    topk_ids: torch.Tensor
    expert_map: torch.Tensor | None
    apply_router_weight_on_input: bool
    out: torch.Tensor


def is_low_latency(layer: Layer, tokens: int, expert_map: torch.Tensor | None) -> bool:
    """Whether a call of `tokens` tokens takes the low-latency assignment, unless its tiles say otherwise."""
    # Weights with K groups take it as well, unlike in vLLM, whose group kernel has no such path; docs/performance.md
    # has the figures. `_prepare_expert_assignment` keeps vLLM's rule.
    return low_latency_applies(tokens, layer.top_k, layer.local_experts, expert_map)


def _takes_low_latency(layer: Layer, tokens: int, tiles: LayerTiles, expert_map: torch.Tensor | None) -> bool:
    if tiles.low_latency is None or expert_map is not None:
        return is_low_latency(layer, tokens, expert_map)
    return tiles.low_latency


def launch_key(layer: Layer, tokens: int, tiles: LayerTiles, expert_map: torch.Tensor | None) -> tuple[object, ...]:
    """Equal for two token counts iff they run the same compiled kernels."""
    if tiles.gemm1.family == "stream":
        return tiles, tokens
    reduce_key = reduce_launch_key(tokens, layer.hidden_size, layer.dtype.itemsize)
    if tiles.gemm1.family == "portable" and _takes_low_latency(layer, tokens, tiles, expert_map):
        return tiles, reduce_key, None
    return tiles, reduce_key, align_launch_key(tokens * layer.top_k, _aligned_experts(layer, expert_map))


def run(layer: Layer, call: Call, tiles: LayerTiles) -> None:
    """assignment -> GEMM1 + activation -> GEMM2 -> reduce, into call.out; no host synchronisation.

    A scheme with quantised activations adds one launch before each GEMM (two for a dynamic scale of the whole tensor).
    All memory comes from torch's caching allocator within the call: reused from call to call, and safe on every
    stream and in CUDA graphs.
    """
    if tiles.gemm1.family == "stream":
        run_stream(layer, call, tiles.gemm1)
        return
    x, w13, w2 = call.hidden_states, call.w13, call.w2
    if tiles.gemm1.family == "cooperative":
        room = new_room(x, layer.scheme, w13.values.dtype, w13.input_scale)
        aligned, (first_rows, counters) = _align(layer, call, tiles.gemm1)
        experts = _aligned_experts(layer, call.expert_map)
        run_cooperative(layer, call, tiles, (*aligned, first_rows), counters, experts, room)
        return
    slots = call.topk_ids.numel()
    assignment: Assignment
    low_latency = _takes_low_latency(layer, x.shape[0], tiles, call.expert_map)
    room = None if low_latency else new_room(x, layer.scheme, w13.values.dtype, w13.input_scale)
    if low_latency:
        # What _prepare_expert_assignment returns, less its fill launch: the kernels count the slots themselves.
        assignment = (None, call.topk_ids.view(-1), None)
        num_blocks = slots
    else:
        block = tiles.gemm1.BLOCK_SIZE_M
        assignment, _ = _align(layer, call, tiles.gemm1)
        active = min(slots, layer.local_experts)
        num_blocks = active + (slots - active) // block
    experts = _aligned_experts(layer, call.expert_map)
    hidden = x.new_empty((slots, layer.intermediate_size))
    slot_outputs = x.new_empty((slots, layer.hidden_size))
    routing = (call.topk_weights, assignment, slots, num_blocks)
    on_input = call.apply_router_weight_on_input

    a = quantise(x, layer.scheme, w13.values.dtype, w13.input_scale, None, tiles.gemm1.PDL, room)
    _launch_gemm(layer, "gemm1", a, w13, hidden, routing, layer.top_k, on_input, tiles.gemm1)
    written = Slots(call.topk_ids, call.expert_map, experts, layer.local_experts)
    a = quantise(hidden, layer.scheme, w2.values.dtype, w2.input_scale, written, tiles.gemm1.PDL)
    _launch_gemm(layer, "gemm2", a, w2, slot_outputs, routing, 1, not on_input, tiles.gemm2)
    top_k_reduce(slot_outputs, call.topk_ids, call.out, experts, call.expert_map, layer.local_experts, tiles.gemm2.PDL)


def _align(
    layer: Layer, call: Call, tile: TileConfig
) -> tuple[tuple[torch.Tensor, torch.Tensor, torch.Tensor], list[torch.Tensor]]:
    """Aligned assignment and, for the family that wants them, align_into's first_rows and counters; in one buffer.

    With an expert_map the remote slots vanish.
    """
    slots, block = call.topk_ids.numel(), tile.BLOCK_SIZE_M
    experts = _aligned_experts(layer, call.expert_map)
    length, num_blocks = align_lengths(slots, block, experts)
    sizes = [length, num_blocks, 1, align_scratch_size(slots, experts)]
    if tile.family == "cooperative":
        sizes += [num_blocks + 1, NUM_TICKETS.value + num_blocks]
    buffer = torch.empty(sum(sizes), dtype=torch.int32, device=call.topk_ids.device)
    sorted_ids, expert_ids, num_sorted, scratch, *more = buffer.split(sizes)
    align_into(
        call.topk_ids, block, experts, sorted_ids, expert_ids, num_sorted, call.expert_map, True, scratch, tile.PDL,
        call.w13.values, *more,
    )  # fmt: skip
    return (sorted_ids, expert_ids, num_sorted), more


def _aligned_experts(layer: Layer, expert_map: torch.Tensor | None) -> int:
    """The experts that topk_ids counts in: global ones only with a map to local ones."""
    return layer.local_experts if expert_map is None else layer.num_experts


def _launch_gemm(
    layer: Layer,
    op: str,
    a: Activations,
    w: Weight,
    out: torch.Tensor,
    routing: tuple[torch.Tensor, Assignment, int, int],
    top_k: int,
    weighted: bool,
    tile: TileConfig,
) -> None:
    topk_weights, assignment, slots, num_blocks = routing
    experts, rows, depth = layer.w13_shape if op == "gemm1" else layer.w2_shape
    kernel = getattr(layer.kernels, op)
    kernel[(num_blocks * triton.cdiv(rows, tile.BLOCK_SIZE_N),)](
        a.values,
        w.values,
        w.bias,
        out,
        topk_weights,
        *assignment,
        slots,
        a.values.stride(0),
        w.values.stride(0),
        w.values.stride(1),
        *_scales(layer.scheme, a, w),
        NUM_EXPERTS=experts,
        TOP_K=top_k,
        ROWS=rows,
        DEPTH=depth,
        MUL_ROUTED_WEIGHT=weighted,
        BLOCK_SIZE_M=tile.BLOCK_SIZE_M,
        BLOCK_SIZE_N=tile.BLOCK_SIZE_N,
        BLOCK_SIZE_K=tile.BLOCK_SIZE_K,
        GROUP_SIZE_M=tile.GROUP_SIZE_M,
        SWAP_AB=tile.SWAP_AB,
        PDL=tile.PDL,
        **pdl_option(tile.PDL),
        num_warps=tile.num_warps,
        num_stages=tile.num_stages,
    )


def _scales(scheme: Scheme, a: Activations, w: Weight) -> tuple[torch.Tensor | None, ...]:
    """The arguments that the scheme's template adds, in its order."""
    scale = scale_bytes(w.scale)
    if a.scale is not None:
        return a.scale, scale
    return (scale, w.zeros, w.global_scale) if scheme.kind else ()
