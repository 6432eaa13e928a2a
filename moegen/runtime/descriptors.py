"""Tensor descriptors, through which the tensor memory accelerator (TMA) of Hopper GPUs reads: for Gluon kernels."""

from typing import TYPE_CHECKING, Any

import torch

from .device import device_facts

if TYPE_CHECKING:
    from .layer import Call

_ALIGNMENT = 16  # bytes, of a descriptor's address and strides
_UNKNOWN_GPU = 2  # programs of a launch without a GPU, which is only compiled


def readable_by_tma(call: "Call") -> bool:
    """Whether the addresses and strides of weights are as descriptors need them, and tokens begin like that, too.

    Tokens are read by ordinary loads, but of 16 bytes each.
    """
    weights = (call.w13.values, call.w2.values)
    return all(tensor.data_ptr() % _ALIGNMENT == 0 for tensor in (*weights, call.hidden_states)) and all(
        w.stride(2) == 1 and all(stride * w.element_size() % _ALIGNMENT == 0 for stride in w.stride()[:2])
        for w in weights
    )


def descriptor_base(w: torch.Tensor, x: torch.Tensor) -> torch.Tensor:
    """What a descriptor of `w` shows: `w`, or for the warm-up's weights, which have no memory, some on the GPU of `x`.

    Nothing reads it then.
    """
    return torch.empty(_ALIGNMENT, dtype=w.dtype, device=x.device) if w.is_meta and x.is_cuda else w


def descriptor(base: torch.Tensor, shape: list[int], strides: list[int], block: list[int], swizzle: int = 0) -> Any:  # noqa: ANN401 - of a type that need not exist on other GPUs
    """A tensor descriptor for Gluon; swizzle: bytes, of the block's place in shared memory."""
    from triton.experimental.gluon.language import NVMMASharedLayout
    from triton.experimental.gluon.nvidia.hopper import TensorDescriptor

    layout = NVMMASharedLayout(swizzle_byte_width=swizzle, element_bitwidth=8 * base.element_size(), rank=len(block))
    return TensorDescriptor(base, shape, strides, block, layout)


def multiprocessors(x: torch.Tensor) -> int:
    """Of the GPU of `x`: the programs of a persistent launch."""
    return device_facts(x.device.index).num_sms if x.is_cuda else _UNKNOWN_GPU
