"""Every wrong argument of fused_experts is refused by name, value and what is allowed; nothing is run or written."""

from collections.abc import Callable
from types import ModuleType
from typing import Any

import pytest
import torch

from moegen.spec import Parallel
from tests.support.packages import make_inputs

TOKENS = 5
SENTINEL = 7.0

Arguments = dict[str, Any]
Change = Callable[[Arguments], object]

# the base package: E = 8, top_k = 2, H = 64, I = 32, bfloat16, no bias
PLAIN: dict[str, Any] = {}
BIASED = {"bias": True}
TOP_1 = {"top_k": 1}
SHARDED = {"parallel": (Parallel(ep=2),)}


def column_major(value: torch.Tensor) -> torch.Tensor:
    """The same values with the last two dimensions stored the other way round."""
    return value.mT.contiguous().mT


# package, argument, its wrong value, error, what the message must hold besides the name
CASES: dict[str, tuple[dict[str, Any], str, Change, type[Exception], tuple[str, ...]]] = {
    # not a tensor
    **{
        f"{name} is a list": (PLAIN, name, lambda _: [1.0], TypeError, ("list", "torch.Tensor"))
        for name in ("hidden_states", "w13", "w2", "topk_weights", "topk_ids", "expert_map", "out")
    },
    "w13_bias is a list": (BIASED, "w13_bias", lambda _: [1.0], TypeError, ("list", "torch.Tensor")),
    # dtype
    "hidden_states dtype": (
        PLAIN,
        "hidden_states",
        lambda a: a["hidden_states"].half(),
        TypeError,
        ("float16", "bfloat16"),
    ),
    "w13 dtype": (PLAIN, "w13", lambda a: a["w13"].float(), TypeError, ("float32", "bfloat16")),
    "w2 dtype": (PLAIN, "w2", lambda a: a["w2"].char(), TypeError, ("int8", "bfloat16")),
    "topk_weights dtype": (
        PLAIN,
        "topk_weights",
        lambda a: a["topk_weights"].bfloat16(),
        TypeError,
        ("bfloat16", "float32"),
    ),
    "topk_ids dtype": (PLAIN, "topk_ids", lambda a: a["topk_ids"].short(), TypeError, ("int16", "int32", "int64")),
    "w13_bias dtype": (BIASED, "w13_bias", lambda a: a["w13_bias"].half(), TypeError, ("float16", "bfloat16")),
    "expert_map dtype": (
        SHARDED,
        "expert_map",
        lambda _: torch.zeros(8, dtype=torch.int64),
        TypeError,
        ("int64", "int32"),
    ),
    "out dtype": (PLAIN, "out", lambda a: a["out"].float(), TypeError, ("float32", "bfloat16")),
    # dimensions and shapes
    "hidden_states 1-D": (
        PLAIN,
        "hidden_states",
        lambda a: a["hidden_states"][0],
        ValueError,
        ("dimensions 1", "allowed: 2"),
    ),
    "hidden_states 3-D": (
        PLAIN,
        "hidden_states",
        lambda a: a["hidden_states"][None],
        ValueError,
        ("dimensions 3", "allowed: 2"),
    ),
    "hidden_states 0-D": (
        PLAIN,
        "hidden_states",
        lambda a: a["hidden_states"][0, 0],
        ValueError,
        ("dimensions 0", "allowed: 2"),
    ),
    "hidden size": (PLAIN, "hidden_states", lambda a: a["hidden_states"][:, :63], ValueError, ("63", "64")),
    "w13 rows": (PLAIN, "w13", lambda a: a["w13"][:, :63], ValueError, ("[8, 63, 64]", "[8, 64, 64]")),
    "w13 experts": (PLAIN, "w13", lambda a: a["w13"][:7], ValueError, ("[7, 64, 64]", "[8, 64, 64]")),
    "w13 2-D": (PLAIN, "w13", lambda a: a["w13"][0], ValueError, ("[64, 64]", "[8, 64, 64]")),
    "w2 columns": (PLAIN, "w2", lambda a: a["w2"][..., :31], ValueError, ("[8, 64, 31]", "[8, 64, 32]")),
    "w2 experts": (PLAIN, "w2", lambda a: a["w2"][:3], ValueError, ("[3, 64, 32]", "[8, 64, 32]")),
    "top_k": (PLAIN, "topk_ids", lambda a: a["topk_ids"][:, :1].contiguous(), ValueError, ("1", "2")),
    "topk_ids 1-D": (PLAIN, "topk_ids", lambda a: a["topk_ids"].view(-1), ValueError, ("dimensions 1", "allowed: 2")),
    "topk_ids 0-D": (PLAIN, "topk_ids", lambda a: a["topk_ids"][0, 0], ValueError, ("0", "2")),
    "topk_ids tokens": (PLAIN, "topk_ids", lambda a: a["topk_ids"][:4], ValueError, ("[4, 2]", "[5, 2]")),
    "topk_weights tokens": (PLAIN, "topk_weights", lambda a: a["topk_weights"][:4], ValueError, ("[4, 2]", "[5, 2]")),
    "topk_weights top_k": (
        PLAIN,
        "topk_weights",
        lambda a: a["topk_weights"][:, :1].contiguous(),
        ValueError,
        ("[5, 1]", "[5, 2]"),
    ),
    "w13_bias shape": (
        BIASED,
        "w13_bias",
        lambda a: a["w13_bias"][:, :32].contiguous(),
        ValueError,
        ("[8, 32]", "[8, 64]"),
    ),
    "w2_bias shape": (BIASED, "w2_bias", lambda a: a["w2_bias"][:7], ValueError, ("[7, 64]", "[8, 64]")),
    "expert_map length": (
        SHARDED,
        "expert_map",
        lambda _: torch.zeros(7, dtype=torch.int32),
        ValueError,
        ("7", "8"),
    ),
    "expert_map 2-D": (
        SHARDED,
        "expert_map",
        lambda _: torch.zeros((2, 4), dtype=torch.int32),
        ValueError,
        ("[2, 4]", "[8]"),
    ),
    "out shape": (PLAIN, "out", lambda a: a["out"][:4], ValueError, ("[4, 64]", "[5, 64]")),
    # strides
    "hidden_states stride": (
        PLAIN,
        "hidden_states",
        lambda a: column_major(a["hidden_states"]),
        ValueError,
        ("5", "1"),
    ),
    "w13 stride": (PLAIN, "w13", lambda a: column_major(a["w13"]), ValueError, ("last stride 64", "1")),
    "w2 stride": (PLAIN, "w2", lambda a: column_major(a["w2"]), ValueError, ("last stride 64", "1")),
    "topk_ids stride": (PLAIN, "topk_ids", lambda a: column_major(a["topk_ids"]), ValueError, ("(1, 5)", "contiguous")),
    "topk_weights stride": (
        PLAIN,
        "topk_weights",
        lambda a: a["topk_weights"][:, :1].expand(-1, 2),
        ValueError,
        ("(2, 0)", "contiguous"),
    ),
    "w2_bias stride": (BIASED, "w2_bias", lambda a: column_major(a["w2_bias"]), ValueError, ("(1, 8)", "contiguous")),
    "expert_map stride": (
        SHARDED,
        "expert_map",
        lambda _: torch.zeros(16, dtype=torch.int32)[::2],
        ValueError,
        ("(2,)", "contiguous"),
    ),
    "out stride": (PLAIN, "out", lambda a: column_major(a["out"]), ValueError, ("5", "1")),
    "out rows overlap": (PLAIN, "out", lambda a: a["out"][:1].expand(5, 64), ValueError, ("0", "64")),
    # device
    **{
        f"{name} device": (package, name, lambda a, name=name: a[name].to("meta"), ValueError, ("meta", "cpu"))
        for package, name in (
            *[(PLAIN, n) for n in ("hidden_states", "w13", "w2", "topk_weights", "topk_ids", "out")],
            (BIASED, "w13_bias"),
            (BIASED, "w2_bias"),
        )
    },
    "expert_map device": (
        SHARDED,
        "expert_map",
        lambda _: torch.zeros(8, dtype=torch.int32, device="meta"),
        ValueError,
        ("meta", "cpu"),
    ),
    # bias
    "w13_bias missing": (BIASED, "w13_bias", lambda _: None, ValueError, ("missing", "expected", "[8, 64]")),
    "w2_bias missing": (BIASED, "w2_bias", lambda _: None, ValueError, ("missing", "expected", "[8, 64]")),
    "w13_bias unexpected": (PLAIN, "w13_bias", lambda _: torch.zeros(8, 64), ValueError, ("given", "None")),
    "w2_bias unexpected": (PLAIN, "w2_bias", lambda _: torch.zeros(8, 64), ValueError, ("given", "None")),
    # values
    "global_num_experts": (PLAIN, "global_num_experts", lambda _: 16, ValueError, ("16", "-1 or 8")),
    "global_num_experts of a shard": (SHARDED, "global_num_experts", lambda _: 8, ValueError, ("8", "-1 or 4")),
    "weight on input": (
        PLAIN,
        "apply_router_weight_on_input",
        lambda _: True,
        ValueError,
        ("True", "top_k 2", "top_k 1"),
    ),
    # aliasing
    "out is hidden_states": (PLAIN, "out", lambda a: a["hidden_states"], ValueError, ("hidden_states",)),
}


@pytest.mark.parametrize("case", CASES)
def test_refused(case: str, build: Callable[..., ModuleType], monkeypatch: pytest.MonkeyPatch) -> None:
    fields, name, change, error, shown = CASES[case]
    package = build(**fields)
    arguments = make_inputs(package.LAYERS[0], TOKENS)
    kept = arguments["out"] = torch.full((TOKENS, 64), SENTINEL, dtype=torch.bfloat16)
    hidden_states, before = arguments["hidden_states"], arguments["hidden_states"].clone()
    arguments[name] = change(arguments)
    _forbid_work(package, monkeypatch)
    with pytest.raises(error) as caught:
        package.fused_experts(**arguments)
    message = str(caught.value)
    assert type(caught.value) is error
    assert message.startswith(f"{name}: ")
    assert "allowed: " in message or "expected " in message
    assert [text for text in shown if text not in message] == []
    assert bool((kept == SENTINEL).all())
    assert torch.equal(hidden_states, before)


def _forbid_work(package: ModuleType, monkeypatch: pytest.MonkeyPatch) -> None:
    def forbidden(*_: object, **__: object) -> None:
        pytest.fail("a refused call did work")

    for name in ("run", "_run_reference", "moe_reference"):
        monkeypatch.setattr(package.runtime.package, name, forbidden)


def test_all_meta_arguments_are_refused(build: Callable[..., ModuleType]) -> None:
    package = build()
    arguments = {name: value.to("meta") for name, value in make_inputs(package.LAYERS[0], TOKENS).items()}
    with pytest.raises(ValueError, match="hidden_states: device meta is not allowed; allowed: cuda or cpu"):
        package.fused_experts(**arguments)


def test_message_lists_the_shapes_of_all_layers(build: Callable[..., ModuleType]) -> None:
    package = build(sizes=({}, {"intermediate_size": 48}), dtypes=("bfloat16", "float32"))
    arguments = make_inputs(package.LAYERS[0], TOKENS)
    arguments["w13"] = arguments["w13"][:, :50]
    with pytest.raises(ValueError, match=r"w13: shape .*50.* \[8, 64, 64\] or \[8, 96, 64\]"):
        package.fused_experts(**arguments)


def test_a_weight_of_one_layer_with_the_other_of_another(build: Callable[..., ModuleType]) -> None:
    """Every argument fits some layer, but not all of them the same one."""
    package = build(sizes=({}, {"intermediate_size": 48}))
    one, other = (make_inputs(layer, TOKENS) for layer in package.LAYERS)
    with pytest.raises(ValueError, match=r"w2: shape \[8, 64, 48\] is not allowed; allowed: \[8, 64, 32\]"):
        package.fused_experts(**{**one, "w2": other["w2"]})


@pytest.mark.parametrize(
    ("fields", "mapped", "value"),
    [(PLAIN, False, -1), (PLAIN, False, 8), (SHARDED, False, 4), (SHARDED, True, 8), (SHARDED, True, -1)],
)
def test_allowed_global_num_experts(
    fields: dict[str, Any], mapped: bool, value: int, build: Callable[..., ModuleType]
) -> None:
    package = build(**fields)
    arguments = make_inputs(package.LAYERS[0], TOKENS, mapped=mapped)
    assert package.fused_experts(**arguments, global_num_experts=value).shape == (TOKENS, 64)


@pytest.mark.parametrize("max_tokens", [0, -1, True, 1.0, "8", None])
def test_warmup_refuses(max_tokens: Any, build: Callable[..., ModuleType]) -> None:
    with pytest.raises(ValueError, match=r"max_tokens: .* is not allowed; allowed: an integer from 1"):
        build().warmup(max_tokens)


@pytest.mark.skipif(torch.cuda.is_available(), reason="a GPU is there")
def test_warmup_without_a_gpu(build: Callable[..., ModuleType]) -> None:
    with pytest.raises(RuntimeError, match="no GPU"):
        build().warmup(8)


def test_top_1_takes_the_weight_on_the_input(build: Callable[..., ModuleType]) -> None:
    package = build(**TOP_1)
    arguments = make_inputs(package.LAYERS[0], TOKENS)
    assert package.fused_experts(**arguments, apply_router_weight_on_input=True).shape == (TOKENS, 64)
