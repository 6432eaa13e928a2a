"""The family "stream", a layer of few tokens in one launch (stream_kernel.py): scratch and launch."""

import functools
import threading
from typing import TYPE_CHECKING, Any

import torch

from .descriptors import descriptor, descriptor_base, multiprocessors
from .kernel_parts import pdl_option
from .quantise import least_maximum
from .stream_sizes import PART_BYTES, StreamSizes
from .tile import TileConfig
from .weight import scale_bytes

if TYPE_CHECKING:
    from .layer import Call, Layer

_WORDS, _WORD_STRIDE = 1 << 18, 8  # barrier words of a GPU, and int32 values from one to the next (a sector of L2)
# Two blocks fit a multiprocessor, so that the next layer's waits there while this one ends: registers a thread, of the
# warps that multiply and of four, the two that load rounded up to a warpgroup.
_REGISTERS = {4: 128, 8: 80}


def stream_sizes(layer: "Layer", tile: TileConfig, tokens: int, weight_on_input: bool) -> StreamSizes:
    """What the kernel of a layer is compiled for."""
    return StreamSizes(
        num_experts=layer.num_experts,
        local_experts=layer.local_experts,
        tokens=tokens,
        top_k=layer.top_k,
        hidden_size=layer.hidden_size,
        intermediate_size=layer.intermediate_size,
        gated=layer.activation.gated,
        interleaved=layer.activation.interleaved,
        weight_on_input=weight_on_input,
        value_bytes=layer.gemm("gemm1").a_bits // 8,
        quantised=layer.scheme.row.activation is not None,
        group_n=layer.scheme.group_n,
        group_k=layer.scheme.group_k,
        by_tensor=layer.scheme.kind == "tensor",
        ue8m0=layer.scheme.ue8m0,
        least=least_maximum(layer.scheme),
        columns=tile.BLOCK_SIZE_N // 2,
        warps=tile.num_warps,
        depth=tile.BLOCK_SIZE_K,
        stages=tile.num_stages,
        pdl=tile.PDL,
    )


class BarrierWords:
    """Words of device memory for barriers over a grid: two launches that may overlap never get the same.

    Launches on one stream follow each other, so a stream has one word. A captured launch gets one that nothing else is
    ever given, since its graph may be replayed on any stream.
    """

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._lock = threading.Lock()
        self._words = torch.zeros(_WORDS * _WORD_STRIDE, dtype=torch.int32, device=device)
        if device.type == "cuda":
            torch.cuda.current_stream(device).synchronize()  # other streams use the words too
        self._used = 0
        self._of_stream: dict[int, torch.Tensor] = {}

    def word(self) -> torch.Tensor:
        """int32 [1] for a launch on the current stream. RuntimeError when more than 262,000 launches were captured."""
        if self._device.type != "cuda":
            return self._words[:1]
        if torch.cuda.is_current_stream_capturing():
            return self._new()
        stream = torch.cuda.current_stream(self._device).cuda_stream
        word = self._of_stream.get(stream)
        return self._of_stream.setdefault(stream, self._new()) if word is None else word

    def _new(self) -> torch.Tensor:
        with self._lock:
            first, self._used = self._used, self._used + 1
        if first >= _WORDS:
            raise RuntimeError(f"CUDA graphs of this process hold {_WORDS} launches of the family stream; no more fit")
        return self._words[first * _WORD_STRIDE :][:1]


@functools.cache
def barrier_words(device: torch.device) -> BarrierWords:
    """Those of a GPU; made by the first call, which is never captured (package.py holds that)."""
    return BarrierWords(device)


@functools.cache
def _kernel() -> Any:  # noqa: ANN401 - a Gluon function has no Python type
    # Imported where it is used: nothing of Gluon is needed, nor has to exist, on other GPUs.
    from .stream_kernel import stream_layer

    return stream_layer


def run_stream(layer: "Layer", call: "Call", tile: TileConfig) -> None:
    """`layer.run` for tile configs of this family: few tokens, with or without an expert_map."""
    x, w13, w2 = call.hidden_states, call.w13, call.w2
    sizes = stream_sizes(layer, tile, x.shape[0], call.apply_router_weight_on_input)
    hidden = x.new_empty((x.shape[0] * layer.top_k, layer.intermediate_size))
    _kernel()[(multiprocessors(x),)](
        _weight_descriptor(w13.values, x, sizes, True),
        _weight_descriptor(w2.values, x, sizes, False),
        scale_bytes(w13.scale),
        scale_bytes(w2.scale),
        w13.input_scale,
        w2.input_scale,
        x.contiguous(),
        hidden,
        call.out,
        call.out.stride(0),
        w13.bias,
        w2.bias,
        call.topk_weights,
        call.topk_ids,
        call.expert_map,
        barrier_words(x.device).word(),
        ACTIVATION=layer.kernels.activation,
        S=sizes,
        num_warps=tile.num_warps,
        maxnreg=_REGISTERS[tile.num_warps],
        launch_cooperative_grid=True,  # all blocks run at once or none: the barrier over the grid needs them all
        **pdl_option(tile.PDL),
    )


def _weight_descriptor(w: torch.Tensor, x: torch.Tensor, sizes: StreamSizes, first_gemm: bool) -> Any:  # noqa: ANN401
    """[E, 2, rows / 2, K] of a weight [E, rows, K]: gate and up rows, or the first and the second half.

    K is parts and their values, if rows end with a part.
    """
    experts, rows, depth = w.shape
    per_expert, per_row = w.stride(0), w.stride(1)
    if first_gemm and sizes.interleaved:
        strides = [per_expert, per_row, 2 * per_row]
    else:
        strides = [per_expert, rows // 2 * per_row, per_row]
    shape, block = [experts, 2, rows // 2], [1, 2, sizes.columns]
    if sizes.whole:
        shape, strides = [*shape, depth // sizes.part, sizes.part], [*strides, sizes.part, 1]
        block = [*block, sizes.step1 if first_gemm else sizes.step2, sizes.part]
    else:
        shape, strides, block = [*shape, depth], [*strides, 1], [*block, sizes.part]
    return descriptor(descriptor_base(w, x), shape, strides, block, PART_BYTES)
