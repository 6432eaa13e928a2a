"""torch's grouped GEMM as a peer: an unquantised silu layer of `grouped_mm` and other operators of torch.

moegen bench out/moe_NAME --peer tools/peer_grouped_mm.py:fused_experts=grouped_mm
"""

import torch
from torch.nn.functional import grouped_mm, silu


def fused_experts(
    x: torch.Tensor, w13: torch.Tensor, w2: torch.Tensor, topk_weights: torch.Tensor, topk_ids: torch.Tensor
) -> torch.Tensor:
    """x [T, H], w13 [E, 2I, H], w2 [E, H, I], topk_weights and topk_ids [T, k] -> [T, H]; no host synchronisation."""
    tokens, top_k = topk_ids.shape
    sorted_ids, order = topk_ids.flatten().sort(stable=True)
    ends = torch.searchsorted(
        sorted_ids, torch.arange(w13.shape[0], dtype=sorted_ids.dtype, device=x.device), right=True, out_int32=True
    )
    gate, up = grouped_mm(x[order // top_k], w13.transpose(1, 2), offs=ends).chunk(2, dim=-1)
    outputs = grouped_mm(silu(gate) * up, w2.transpose(1, 2), offs=ends)
    slots = torch.empty_like(outputs)
    slots[order] = outputs * topk_weights.flatten()[order, None].to(outputs.dtype)
    return slots.view(tokens, top_k, -1).sum(1)
