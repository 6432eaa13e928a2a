"""moe_align_block_size in the interpreter against the plain model: every entry of every output, poisoned beforehand."""

import itertools
from typing import Any

import pytest
import torch

from moegen.runtime import align
from moegen.runtime.align import align_into, align_launch_key, align_lengths, align_scratch_size, moe_align_block_size
from tests.support.align_model import Alignment, align_plain, align_vectorised, first_rows_of

POISON = -777
TOKENS, EXPERTS, TOP_K, BLOCKS = (0, 1, 2, 3, 7, 33, 256), (8, 60, 256, 257, 1024), (1, 6, 22), (8, 16, 128)
# (expert_map given, ignore_invalid_experts)
MAPS = ((False, False), (True, False), (True, True))

# Tokens, experts and top_k in full; block sizes and kinds of map rotate so that each meets every value of these.
GRID = [
    (tokens, experts, top_k, BLOCKS[(i + j + n) % 3], MAPS[(i + 2 * j + n) % 3])
    for (i, tokens), (j, experts), (n, top_k) in itertools.product(*map(enumerate, (TOKENS, EXPERTS, TOP_K)))
    if top_k <= experts
]


def _routing(tokens: int, experts: int, top_k: int, seed: int = 0) -> torch.Tensor:
    """Ids [tokens, top_k]: random, one hot expert, and about a tenth outside 0 … experts − 1."""
    generator = torch.Generator().manual_seed(seed)
    ids = torch.randint(experts, (tokens, top_k), generator=generator, dtype=torch.int32)
    chance = torch.rand(tokens, top_k, generator=generator)
    ids[chance < 0.3] = experts // 3
    ids[chance < 0.07] = -1
    ids[chance < 0.03] = experts + 5
    return ids


def _half_map(experts: int) -> torch.Tensor:
    """Every second expert lives here, numbered from the back: local order differs from global order."""
    expert_map = torch.full((experts,), -1, dtype=torch.int32)
    local = torch.arange(0, experts, 2)
    expert_map[local] = torch.arange(len(local) - 1, -1, -1, dtype=torch.int32)
    return expert_map


def _expected(
    ids: torch.Tensor, block: int, experts: int, expert_map: torch.Tensor | None, ignore: bool, pad: bool = False
) -> Alignment:
    listed = None if expert_map is None else expert_map.tolist()
    sorted_ids, expert_ids, total = align_plain(ids.flatten().tolist(), block, experts, listed, pad, ignore)
    return Alignment(*(torch.tensor(values, dtype=torch.int32) for values in (sorted_ids, expert_ids, [total])))


def _check(
    ids: torch.Tensor,
    block: int,
    experts: int,
    expert_map: torch.Tensor | None = None,
    ignore: bool = False,
    pad: bool = False,
    counts: bool = False,
) -> None:
    """Every entry of the three outputs, which held POISON before the call; and of what comes beside them on request."""
    length, num_blocks = align_lengths(ids.numel(), block, experts, pad)
    got = Alignment(*(torch.full((size,), POISON, dtype=torch.int32) for size in (length, num_blocks, 1)))
    scratch = torch.full((align_scratch_size(ids.numel(), experts),), POISON, dtype=torch.int32)
    sizes = (num_blocks + 1, align.NUM_TICKETS.value + num_blocks) if counts else ()
    beside = [torch.full((size,), POISON, dtype=torch.int32) for size in sizes]
    align_into(ids, block, experts, *got, expert_map, ignore, scratch, False, None, *beside)
    wanted = _expected(ids, block, experts, expert_map, ignore, pad)
    if counts:
        first_rows, counters = beside
        assert not counters.any()
        assert torch.equal(first_rows, first_rows_of(wanted, block, ids.numel()))
    for name, value, expected in zip(Alignment._fields, got, wanted, strict=True):
        assert torch.equal(value, expected), f"{name}: {value.tolist()[:40]} instead of {expected.tolist()[:40]}"


@pytest.mark.parametrize(("tokens", "experts", "top_k", "block", "mapping"), GRID)
def test_one_launch(
    monkeypatch: pytest.MonkeyPatch, tokens: int, experts: int, top_k: int, block: int, mapping: tuple[bool, bool]
) -> None:
    monkeypatch.setattr(align, "_RECOUNT_LIMIT", 1 << 60)
    given, ignore = mapping
    assert align_scratch_size(tokens * top_k, experts) == 0
    _check(_routing(tokens, experts, top_k), block, experts, _half_map(experts) if given else None, ignore)


@pytest.mark.parametrize(("tokens", "experts", "top_k", "block", "mapping"), GRID)
def test_two_launches(
    monkeypatch: pytest.MonkeyPatch, tokens: int, experts: int, top_k: int, block: int, mapping: tuple[bool, bool]
) -> None:
    monkeypatch.setattr(align, "_RECOUNT_LIMIT", -1)
    monkeypatch.setattr(align, "_PROGRAMS", 5)  # several tiles a program, without a batch of 10 000 tokens
    given, ignore = mapping
    assert tokens == 0 or align_scratch_size(tokens * top_k, experts) > 0
    _check(_routing(tokens, experts, top_k), block, experts, _half_map(experts) if given else None, ignore)


@pytest.mark.parametrize("limit", [1 << 21, -1], ids=["one_launch", "two_launches"])
def test_many_tiles_in_one_program(monkeypatch: pytest.MonkeyPatch, limit: int) -> None:
    monkeypatch.setattr(align, "_RECOUNT_LIMIT", limit)
    monkeypatch.setattr(align, "_PROGRAMS", 2)
    _check(_routing(300, 60, 7), 8, 60)


def test_int64_ids_do_not_wrap() -> None:
    ids = _routing(33, 60, 6).long()
    ids[5, 2] = 2**32 + 3
    ids[6, 2] = -(2**40)
    _check(ids, 16, 60)
    _check(ids, 16, 60, _half_map(60), True)


@pytest.mark.parametrize(("tokens", "experts", "block"), [(7, 8, 16), (3, 60, 128), (33, 60, 24)])
def test_pad_sorted_ids(tokens: int, experts: int, block: int) -> None:
    """The length is a multiple of the block, also for a block size that is no power of two."""
    _check(_routing(tokens, experts, 6), block, experts, pad=True)


@pytest.mark.parametrize("value", [-1, 3, 8], ids=["all_padding", "one_expert", "all_outside"])
def test_one_value_everywhere(value: int) -> None:
    _check(torch.full((33, 6), value, dtype=torch.int32), 16, 8)


def test_public_function_and_shapes() -> None:
    ids = _routing(33, 60, 6)
    for shaped in (ids, ids.flatten(), ids.view(3, 11, 6)):
        for pad in (False, True):
            got = moe_align_block_size(shaped, 16, 60, _half_map(60), pad, True)
            wanted = _expected(ids, 16, 60, _half_map(60), True, pad=pad)
            assert all(map(torch.equal, got, wanted))


@pytest.mark.parametrize("case", GRID[::3])
def test_vectorised_model_equals_plain(case: tuple[int, int, int, int, tuple[bool, bool]]) -> None:
    """The GPU tests trust the vectorised model."""
    tokens, experts, top_k, block, (given, ignore) = case
    ids, expert_map = _routing(tokens, experts, top_k), _half_map(experts) if given else None
    for pad in (False, True):
        got = align_vectorised(ids, block, experts, expert_map, pad, ignore)
        assert all(map(torch.equal, got, _expected(ids, block, experts, expert_map, ignore, pad=pad)))


def test_launch_keys_are_few() -> None:
    keys = {align_launch_key(numel, 128) for numel in range(0, 40000, 7)}
    assert len(keys) <= 4


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"topk_ids": torch.zeros(4, 2)}, TypeError, "topk_ids: dtype torch.float32"),
        ({"topk_ids": torch.zeros(4, 2, dtype=torch.int32).T}, ValueError, "topk_ids: strides"),
        ({"block_size": 0}, ValueError, "block_size: 0"),
        ({"num_experts": 1025}, ValueError, "num_experts: 1025"),
        ({"expert_map": torch.zeros(7, dtype=torch.int32)}, ValueError, "expert_map: shape"),
        ({"expert_map": torch.zeros(8)}, TypeError, "expert_map: dtype"),
    ],
    ids=lambda value: next(iter(value)) if isinstance(value, dict) else "",
)
def test_wrong_arguments_are_named(change: dict[str, Any], error: type[Exception], message: str) -> None:
    arguments: dict[str, Any] = {
        "topk_ids": torch.zeros(4, 2, dtype=torch.int32),
        "block_size": 16,
        "num_experts": 8,
    }
    with pytest.raises(error, match=message):
        moe_align_block_size(**{**arguments, **change})


@pytest.mark.parametrize("tokens", [1, 40, 700])
@pytest.mark.parametrize("mapped", [False, True])
def test_counters_and_first_rows(tokens: int, mapped: bool) -> None:
    """Whatever the number of block programs that share the work."""
    ids = torch.randint(-1, 9, (tokens, 2), dtype=torch.int32)
    _check(ids, 16, 8, _half_map(8) if mapped else None, mapped, pad=True, counts=True)


def test_wrong_buffers_are_named(monkeypatch: pytest.MonkeyPatch) -> None:
    ids, (length, num_blocks) = torch.zeros(4, 2, dtype=torch.int32), align_lengths(8, 16, 8)
    for sizes, message in (
        ((length - 1, num_blocks, 1), "sorted_token_ids: "),
        ((length, num_blocks + 1, 1), "expert_ids: "),
        ((length, num_blocks, 2), "num_tokens_post_padded: 2"),
    ):
        with pytest.raises(ValueError, match=message):
            align_into(ids, 16, 8, *Alignment(*(torch.empty(size, dtype=torch.int32) for size in sizes)))
    monkeypatch.setattr(align, "_RECOUNT_LIMIT", -1)
    buffers = Alignment(*(torch.empty(size, dtype=torch.int32) for size in (length, num_blocks, 1)))
    with pytest.raises(ValueError, match="counters: 3"):
        align_into(ids, 16, 8, *buffers, counters=torch.empty(3, dtype=torch.int32))
    with pytest.raises(ValueError, match="first_rows: 3"):
        align_into(ids, 16, 8, *buffers, first_rows=torch.empty(3, dtype=torch.int32))
    with pytest.raises(ValueError, match="scratch: 0"):
        align_into(ids, 16, 8, *buffers)
    with pytest.raises(TypeError, match="scratch: dtype"):
        align_into(ids, 16, 8, *buffers, scratch=torch.empty(1000))
