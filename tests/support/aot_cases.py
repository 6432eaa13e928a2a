"""Kernels of moegen/runtime with what the ahead-of-time compile tests need to know about each."""

from collections.abc import Mapping
from typing import Any, NamedTuple

from moegen.runtime import align, reduce


class AotCase(NamedTuple):
    """One kernel to compile: a run-time argument's type by name, a constexpr argument's value by name."""

    name: str
    kernel: Any
    signature: Mapping[str, str]
    constexprs: Mapping[str, object]
    num_warps: int


def _case(
    name: str, kernel: Any, types: Mapping[str, str], constexprs: Mapping[str, object], num_warps: int
) -> AotCase:
    """Arguments that `types` leaves out are int32."""
    signature = {
        argument: "constexpr" if argument in constexprs else types.get(argument, "i32") for argument in kernel.arg_names
    }
    return AotCase(name, kernel, signature, constexprs, num_warps)


def _align_cases() -> list[AotCase]:
    buffers = ("expert_map", "chunk_counts", "sorted_token_ids", "expert_ids", "num_tokens_post_padded", "counters",
               "first_rows")  # fmt: skip
    cases = []
    for numel, experts, mapping, id_type in (
        (16, 8, align.NO_MAP, "i32"),
        (300, 128, align.NO_MAP, "i64"),
        (1000, 257, align.MAP_BLOCKS, "i32"),
        (1000, 1024, align.MAP_IDS, "i32"),
        (100_000, 128, align.NO_MAP, "i32"),
        (100_000, 1024, align.MAP_IDS, "i64"),
    ):
        tiles = align.align_launch_key(numel, experts)
        types = dict.fromkeys(buffers, "*i32") | {"topk_ids": f"*{id_type}"}
        fixed: dict[str, object] = {"MAPPING": mapping.value, "BINS": tiles.bins, "COUNT_TILE": tiles.count_tile}
        fixed["PDL"] = False  # older GPUs lack it; tests/compile/test_targets.py compiles with it
        if mapping == align.NO_MAP:
            fixed["expert_map"] = None
        if numel < 100_000:  # only some families count
            fixed |= {"counters": None, "first_rows": None}
        if tiles.two_launches:
            name = f"align_count-{numel}-{experts}"
            cases.append(_case(name, align.align_count_kernel, types, fixed, tiles.num_warps))
        else:
            fixed["chunk_counts"] = None
        # Weights are fetched with PDL only.
        whole = fixed | {"SLOT_TILE": tiles.slot_tile, "THREADS": 32 * tiles.num_warps, "weights": None}
        cases.append(_case(f"align-{numel}-{experts}", align.align_kernel, types, whole, tiles.num_warps))
    return cases


def _reduce_cases() -> list[AotCase]:
    cases = []
    for tokens, top_k, dtype, mapped in ((1, 8, "bf16", False), (4096, 22, "bf16", True), (4096, 6, "fp32", False)):
        tiles = reduce.reduce_launch_key(tokens, 2048, 4 if dtype == "fp32" else 2)
        types = {"slot_outputs": f"*{dtype}", "out": f"*{dtype}", "topk_ids": "*i32", "expert_map": "*i32"}
        fixed: dict[str, object] = {"TOP_K": top_k, "TOP_K_PADDED": 1 << (top_k - 1).bit_length()}
        fixed |= {"BLOCK_H": tiles.block_h, "PDL": False} | ({} if mapped else {"expert_map": None})
        cases.append(_case(f"reduce-{tokens}-{dtype}", reduce.top_k_reduce_kernel, types, fixed, tiles.num_warps))
    return cases


AOT_CASES: tuple[AotCase, ...] = (*_align_cases(), *_reduce_cases())
