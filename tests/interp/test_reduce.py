"""top_k_reduce in the interpreter against a float32 sum in slot order; skipped rows hold NaN."""

import pytest
import torch

from moegen.runtime import reduce
from moegen.runtime.reduce import reduce_launch_key, top_k_reduce

EXPERTS = 16


def _inputs(tokens: int, top_k: int, hidden: int, dtype: torch.dtype) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(tokens + top_k + hidden)
    slots = torch.randn(tokens * top_k, hidden, generator=generator).to(dtype)
    return slots, torch.randint(EXPERTS, (tokens, top_k), generator=generator, dtype=torch.int32)


def _expected(slots: torch.Tensor, live: torch.Tensor) -> torch.Tensor:
    tokens, top_k = live.shape
    total = torch.zeros(tokens, slots.shape[1])
    for slot in range(top_k):
        total += torch.where(live[:, slot, None], slots.view(tokens, top_k, -1)[:, slot].float(), 0.0)
    return total.to(slots.dtype)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32], ids=str)
@pytest.mark.parametrize(
    ("tokens", "top_k", "hidden"), [(1, 1, 64), (3, 8, 300), (5, 6, 256), (2, 22, 513), (2, 32, 16)]
)
def test_sum_in_slot_order(tokens: int, top_k: int, hidden: int, dtype: torch.dtype) -> None:
    slots, ids = _inputs(tokens, top_k, hidden, dtype)
    out = torch.full((tokens, hidden), float("nan"), dtype=dtype)
    top_k_reduce(slots, ids, out, EXPERTS)
    assert torch.equal(out, _expected(slots, torch.ones_like(ids, dtype=torch.bool)))


@pytest.mark.parametrize("id_dtype", [torch.int32, torch.int64], ids=str)
@pytest.mark.parametrize("mapped", [False, True])
def test_dead_slots_are_never_read(mapped: bool, id_dtype: torch.dtype) -> None:
    slots, ids = _inputs(6, 8, 300, torch.bfloat16)
    ids = ids.to(id_dtype)
    ids[0] = -1
    ids[1, 3], ids[2, 0], ids[2, 7] = -1, EXPERTS, EXPERTS + 9
    expert_map = torch.where(torch.arange(EXPERTS) % 3 == 0, -1, torch.arange(EXPERTS)).int()
    live = (ids >= 0) & (ids < EXPERTS)
    if mapped:
        live &= expert_map[ids.clamp(0, EXPERTS - 1).long()] >= 0
    slots[~live.flatten()] = float("nan")
    out = torch.full((6, 300), float("nan"), dtype=torch.bfloat16)
    top_k_reduce(slots, ids, out, EXPERTS, expert_map if mapped else None)
    assert torch.equal(out, _expected(slots, live))
    assert not out[0].any()


def test_rows_of_out_may_be_strided() -> None:
    slots, ids = _inputs(4, 2, 100, torch.float32)
    wide = torch.full((4, 160), 7.0)
    top_k_reduce(slots, ids, wide[:, 20:120], EXPERTS)
    assert torch.equal(wide[:, 20:120], _expected(slots, torch.ones_like(ids, dtype=torch.bool)))
    assert (wide[:, :20] == 7).all()
    assert (wide[:, 120:] == 7).all()


def test_wide_programs(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(reduce, "_WIDE_FROM_PROGRAMS", 1)
    slots, ids = _inputs(2, 4, 1500, torch.bfloat16)
    out = torch.full((2, 1500), float("nan"), dtype=torch.bfloat16)
    top_k_reduce(slots, ids, out, EXPERTS)
    assert torch.equal(out, _expected(slots, torch.ones_like(ids, dtype=torch.bool)))


def test_no_tokens() -> None:
    top_k_reduce(torch.empty(0, 64), torch.empty(0, 8, dtype=torch.int32), torch.empty(0, 64), EXPERTS)


def test_launch_keys_are_two() -> None:
    assert len({reduce_launch_key(tokens, 2048, 2) for tokens in range(1, 5000)}) == 2


@pytest.mark.parametrize(
    ("slots", "ids", "out", "message"),
    [
        ((6, 8), (2, 2), (2, 8), "slot_outputs: shape"),
        ((4, 8), (2, 2), (3, 8), "out: shape"),
        ((66, 8), (2, 33), (2, 8), "topk_ids: top_k 33"),
    ],
)
def test_wrong_shapes_are_named(
    slots: tuple[int, int], ids: tuple[int, int], out: tuple[int, int], message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        top_k_reduce(torch.zeros(slots), torch.zeros(ids, dtype=torch.int32), torch.zeros(out), EXPERTS)
