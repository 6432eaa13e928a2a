"""Which (token, slot) rows go into which M block: the low-latency assignment or the aligned one."""

from collections.abc import Mapping, Sequence

import torch

from .align import moe_align_block_size


def low_latency_applies(
    num_tokens: int,
    top_k: int,
    global_num_experts: int,
    expert_map: torch.Tensor | None,
    *,
    use_int8_w8a16: bool = False,
    use_int4_w4a16: bool = False,
    block_shape: Sequence[int] | None = None,
    weights_host_resident: bool = False,
) -> bool:
    """The rule that must never be lost: True when every (token, slot) pair becomes its own M block, without a sort.

    It holds iff there is no expert_map, `num_tokens * top_k * 4 <= global_num_experts`, the weights are in device
    memory (each repeated read of host memory would cross the bus), and the mode is not an int8_w8a16 or int4_w4a16
    with a K group. Source: vLLM's `_prepare_expert_assignment` (vllm-project/vllm #29354, restored by #39016).
    """
    grouped_weights = (use_int8_w8a16 or use_int4_w4a16) and block_shape is not None and block_shape[1] > 0
    return (
        expert_map is None
        and not weights_host_resident
        and num_tokens * top_k * 4 <= global_num_experts
        and not grouped_weights
    )


def _prepare_expert_assignment(
    topk_ids: torch.Tensor,
    config: Mapping[str, int],
    num_tokens: int,
    top_k_num: int,
    global_num_experts: int,
    expert_map: torch.Tensor | None,
    *,
    use_int8_w8a16: bool = False,
    use_int4_w4a16: bool = False,
    block_shape: Sequence[int] | None = None,
    ignore_invalid_experts: bool = False,
    weights_host_resident: bool = False,
) -> tuple[torch.Tensor | None, torch.Tensor, torch.Tensor]:
    """Return `(sorted_token_ids, expert_ids, num_tokens_post_padded)` with the names and values of vLLM's function.

    Low-latency: `(None, topk_ids.view(-1), full((1,), numel * BLOCK_SIZE_M, int32))`, the expert ids being the flat
    top-k ids themselves. Otherwise what `moe_align_block_size` returns. `config` needs the key BLOCK_SIZE_M.
    """
    if low_latency_applies(
        num_tokens,
        top_k_num,
        global_num_experts,
        expert_map,
        use_int8_w8a16=use_int8_w8a16,
        use_int4_w4a16=use_int4_w4a16,
        block_shape=block_shape,
        weights_host_resident=weights_host_resident,
    ):
        filled = topk_ids.numel() * config["BLOCK_SIZE_M"]
        return None, topk_ids.view(-1), torch.full((1,), filled, dtype=torch.int32, device=topk_ids.device)
    return moe_align_block_size(
        topk_ids,
        config["BLOCK_SIZE_M"],
        global_num_experts,
        expert_map,
        ignore_invalid_experts=ignore_invalid_experts,
    )
