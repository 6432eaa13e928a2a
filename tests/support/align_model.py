"""Models of `moe_align_block_size`: a plain one that reads like the definition, a vectorised one for large grids."""

from collections.abc import Sequence
from typing import NamedTuple

import torch


class Alignment(NamedTuple):
    """What `moe_align_block_size` returns; compare with `torch.equal`, field by field."""

    sorted_token_ids: torch.Tensor  # int32 [L]
    expert_ids: torch.Tensor  # int32 [cdiv(L, block_size)]
    num_tokens_post_padded: torch.Tensor  # int32 [1]


def align_plain(
    topk_ids: Sequence[int],
    block_size: int,
    num_experts: int,
    expert_map: Sequence[int] | None = None,
    pad_sorted_ids: bool = False,
    ignore_invalid_experts: bool = False,
) -> tuple[list[int], list[int], int]:
    """The definition in plain Python: (sorted_token_ids, expert_ids, num_tokens_post_padded)."""
    numel = len(topk_ids)
    length = numel + num_experts * (block_size - 1)
    if pad_sorted_ids:
        length = -(-length // block_size) * block_size
    if numel < num_experts:
        length = min(numel * block_size, length)
    slots_of: dict[int, list[int]] = {expert: [] for expert in range(num_experts)}
    for slot, expert in enumerate(topk_ids):
        if not 0 <= expert < num_experts:
            continue
        if expert_map is not None and ignore_invalid_experts:
            expert = expert_map[expert]  # from here on the id is a local one
        if expert >= 0:
            slots_of[expert].append(slot)
    sorted_ids: list[int] = []
    expert_ids: list[int] = []
    for expert, slots in slots_of.items():
        blocks = -(-len(slots) // block_size)
        sorted_ids += slots + [numel] * (blocks * block_size - len(slots))
        mapped = expert_map is not None and not ignore_invalid_experts
        expert_ids += [expert_map[expert] if mapped and expert_map is not None else expert] * blocks
    total = len(sorted_ids)
    sorted_ids += [numel] * (length - total)
    expert_ids += [-1] * (-(-length // block_size) - len(expert_ids))
    return sorted_ids, expert_ids, total


def align_vectorised(
    topk_ids: torch.Tensor,
    block_size: int,
    num_experts: int,
    expert_map: torch.Tensor | None = None,
    pad_sorted_ids: bool = False,
    ignore_invalid_experts: bool = False,
) -> Alignment:
    """The same in torch, on any device and without a host synchronisation."""
    ids = topk_ids.reshape(-1).long()
    numel, device = ids.numel(), ids.device
    length = numel + num_experts * (block_size - 1)
    if pad_sorted_ids:
        length = -(-length // block_size) * block_size
    if numel < num_experts:
        length = min(numel * block_size, length)
    dropped = (ids < 0) | (ids >= num_experts)
    ids = ids.masked_fill(dropped, num_experts)
    if expert_map is not None and ignore_invalid_experts:
        local = torch.cat([expert_map.long(), expert_map.new_full((1,), -1).long()])[ids]
        ids = local.masked_fill(local < 0, num_experts)
    counts = torch.zeros(num_experts + 1, dtype=torch.long, device=device).scatter_add_(0, ids, torch.ones_like(ids))
    padded = (counts[:num_experts] + block_size - 1) // block_size * block_size
    ends, slot_ends = padded.cumsum(0), counts.cumsum(0)
    order = ids.argsort(stable=True)
    expert = ids[order].clamp(max=num_experts - 1)
    rank = torch.arange(numel, device=device) - (slot_ends - counts)[expert]
    # Dropped slots sort last; they are sent to one extra entry behind the end.
    position = torch.where(ids[order] < num_experts, (ends - padded)[expert] + rank, length)
    sorted_ids = torch.full((length + 1,), numel, dtype=torch.long, device=device).scatter_(0, position, order)
    starts = torch.arange(-(-length // block_size), device=device) * block_size
    owner = torch.searchsorted(ends, starts, right=True)
    known = owner.clamp(max=num_experts - 1)
    shown = expert_map.long()[known] if expert_map is not None and not ignore_invalid_experts else known
    expert_ids = torch.where(starts < ends[-1], shown, -1)
    return Alignment(sorted_ids[:length].int(), expert_ids.int(), ends[-1:].int())


def first_rows_of(aligned: Alignment, block_size: int, numel: int) -> torch.Tensor:
    """align_into's first_rows, int32 [cdiv(L, block_size) + 1]: slots before each block in use, and all of them."""
    blocks = aligned.expert_ids.numel()
    slots = torch.nn.functional.pad(
        aligned.sorted_token_ids < numel, (0, blocks * block_size - aligned.sorted_token_ids.numel())
    )
    before = torch.nn.functional.pad(slots.view(blocks, block_size).sum(1).cumsum(0), (1, 0))
    before[:blocks][aligned.num_tokens_post_padded.item() // block_size :] = 0
    return before.int()
