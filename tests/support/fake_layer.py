"""A layer without a package: what the benchmark asks of one."""

from dataclasses import dataclass

import torch

from moegen.runtime.activations import Activation

SILU = Activation.of("silu")


@dataclass(frozen=True)
class FakeLayer:
    """The attributes of an emitted package's layer that `moegen.bench` reads."""

    slug: str = "small"
    num_experts: int = 8
    local_experts: int = 8
    top_k: int = 2
    hidden_size: int = 64
    intermediate_size: int = 32
    dtype: torch.dtype = torch.bfloat16
    activation: Activation = SILU
    bias: bool = False
    quant: str = "none"
