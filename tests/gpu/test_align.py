"""moe_align_block_size on a GPU, exact against the vectorised model over the full grid."""

import os

import pytest
import torch

from moegen.runtime.align import align_into, align_lengths, align_scratch_size, moe_align_block_size
from tests.support.align_model import Alignment, align_vectorised

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA or HIP device"),
    pytest.mark.skipif(os.environ.get("TRITON_INTERPRET") == "1", reason="needs compiled kernels"),
]

POISON = -777
TOKENS = (1, 2, 3, 7, 16, 33, 64, 100, 256, 1000, 2256, 4096)
EXPERTS = (8, 32, 60, 64, 128, 160, 256, 257, 384, 512, 896)
TOP_K = (1, 2, 4, 6, 8, 10, 16, 22)
BLOCKS = (8, 16, 32, 64, 128)


def _routing(tokens: int, experts: int, top_k: int) -> torch.Tensor:
    """Ids [tokens, top_k] on the GPU: random, one hot expert, some outside 0 … experts − 1; always the same."""
    generator = torch.Generator("cuda").manual_seed((tokens * 1009 + experts) * 31 + top_k)
    ids = torch.randint(experts, (tokens, top_k), generator=generator, device="cuda", dtype=torch.int32)
    chance = torch.rand(tokens, top_k, generator=generator, device="cuda")
    ids = torch.where(chance < 0.2, experts // 3, ids)
    ids = torch.where(chance < 0.05, -1, ids)
    return torch.where(chance < 0.02, experts + 5, ids).int()


def _rank_map(experts: int) -> torch.Tensor:
    """Rank 1 of 2: the second half of the experts lives here."""
    expert_map = torch.full((experts,), -1, dtype=torch.int32)
    expert_map[experts // 2 :] = torch.arange(experts - experts // 2, dtype=torch.int32)
    return expert_map.cuda()


def _aligned_into_poison(
    ids: torch.Tensor, block: int, experts: int, expert_map: torch.Tensor | None, ignore: bool
) -> Alignment:
    length, num_blocks = align_lengths(ids.numel(), block, experts)
    got = Alignment(*(torch.full((n,), POISON, dtype=torch.int32, device="cuda") for n in (length, num_blocks, 1)))
    scratch_size = align_scratch_size(ids.numel(), experts)
    scratch = torch.full((scratch_size,), POISON, dtype=torch.int32, device="cuda") if scratch_size else None
    align_into(ids, block, experts, *got, expert_map, ignore, scratch)
    return got


def _count_differences(got: Alignment, wanted: Alignment) -> torch.Tensor:
    """A device scalar, so that a thousand comparisons cost one synchronisation."""
    return torch.stack([(left != right).sum() for left, right in zip(got, wanted, strict=True)]).sum()


@pytest.mark.parametrize("mapping", ["no_map", "map_blocks", "map_ids"])
@pytest.mark.parametrize("experts", EXPERTS)
def test_full_grid(experts: int, mapping: str) -> None:
    expert_map = None if mapping == "no_map" else _rank_map(experts)
    ignore = mapping == "map_ids"
    cases, differences = [], []
    for tokens in TOKENS:
        for top_k in TOP_K:
            if top_k > experts:
                continue
            ids = _routing(tokens, experts, top_k)
            for block in BLOCKS:
                got = _aligned_into_poison(ids, block, experts, expert_map, ignore)
                wanted = align_vectorised(ids, block, experts, expert_map, ignore_invalid_experts=ignore)
                cases.append((tokens, top_k, block))
                differences.append(_count_differences(got, wanted))
    wrong = torch.stack(differences).tolist()
    failures = [f"{case}: {count}" for case, count in zip(cases, wrong, strict=True) if count]
    assert not failures, f"(tokens, top_k, block): differing entries {failures[:10]} of {len(failures)}"


@pytest.mark.parametrize("dtype", [torch.int32, torch.int64], ids=str)
@pytest.mark.parametrize("block", [16, 64, 128])
def test_hundred_thousand_tokens(block: int, dtype: torch.dtype) -> None:
    ids = _routing(100_000, 128, 8).to(dtype)
    got = _aligned_into_poison(ids, block, 128, None, False)
    assert _count_differences(got, align_vectorised(ids, block, 128)).item() == 0


@pytest.mark.parametrize(("tokens", "experts"), [(7, 8), (33, 896), (1000, 128), (4096, 256)])
def test_repeats_are_identical(tokens: int, experts: int) -> None:
    ids = _routing(tokens, experts, 8)
    first = moe_align_block_size(ids, 32, experts)
    for _ in range(19):
        assert all(map(torch.equal, moe_align_block_size(ids, 32, experts), first))


def test_no_tokens() -> None:
    ids = torch.empty(0, 8, dtype=torch.int32, device="cuda")
    sorted_ids, expert_ids, total = moe_align_block_size(ids, 16, 64)
    assert (sorted_ids.numel(), expert_ids.numel(), total.item()) == (0, 0, 0)


def test_ids_need_no_alignment() -> None:
    """A slice of a larger router output starts at any 4-byte address."""
    ids = _routing(101, 60, 3)[1:]
    got = moe_align_block_size(ids, 16, 60)
    assert _count_differences(Alignment(*got), align_vectorised(ids, 16, 60)).item() == 0


def test_graph_replay_follows_new_ids() -> None:
    ids = _routing(256, 128, 8)
    moe_align_block_size(ids, 16, 128)  # compiled before the capture
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        got = moe_align_block_size(ids, 16, 128)
    ids.copy_(ids.flip(0))
    graph.replay()
    assert _count_differences(Alignment(*got), align_vectorised(ids, 16, 128)).item() == 0
