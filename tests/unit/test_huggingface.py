"""config.json of every family gives the layer that models.yaml states; what is not known is an error."""

import json
from pathlib import Path
from typing import Any

import pytest

from moegen.huggingface import FAMILIES, spec_from_config
from moegen.models import model_spec
from moegen.runtime.activations import Activation
from moegen.spec import Shape, SpecError

SAMPLES = sorted((Path(__file__).parent / "data" / "hf").glob("*.json"))

QWEN3: dict[str, Any] = {
    "model_type": "qwen3_moe",
    "hidden_act": "silu",
    "hidden_size": 2048,
    "moe_intermediate_size": 768,
    "num_experts": 128,
    "num_experts_per_tok": 8,
}
STEP3P5: dict[str, Any] = {
    "model_type": "step3p5",
    "hidden_act": "silu",
    "hidden_size": 4096,
    "moe_intermediate_size": 1280,
    "moe_num_experts": 288,
    "moe_top_k": 8,
}


def load(name: str) -> dict[str, Any]:
    path = next(sample for sample in SAMPLES if sample.stem == name)
    config: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    return config


@pytest.mark.parametrize("path", SAMPLES, ids=lambda path: path.stem)
def test_sample_equals_models_yaml(path: Path) -> None:
    spec = spec_from_config(path)
    known = model_spec(path.stem)
    assert spec.shapes == known.shapes
    assert spec.activation == known.activation
    assert spec.bias == known.bias
    assert spec.dtypes == ("bfloat16",)
    assert spec.name == path.stem


def test_samples_cover_many_families() -> None:
    texts = [json.loads(path.read_text(encoding="utf-8")) for path in SAMPLES]
    assert len({text["model_type"] for text in texts}) >= 12
    assert sum("text_config" in text for text in texts) >= 4


def test_text_config_of_thinker() -> None:
    inner = {**QWEN3, "model_type": "qwen3_omni_moe_text"}
    spec = spec_from_config({"model_type": "qwen3_omni_moe", "thinker_config": {"text_config": inner}})
    assert spec.shapes == (Shape(num_experts=128, top_k=8, hidden_size=2048, intermediate_size=768),)
    assert spec.name == "qwen3_omni_moe"


@pytest.mark.parametrize(
    ("changes", "dtype"),
    [
        ({}, "bfloat16"),
        ({"torch_dtype": "float16"}, "float16"),
        ({"dtype": "float32"}, "float32"),
        ({"dtype": None, "torch_dtype": "float16"}, "float16"),
    ],
)
def test_dtype(changes: dict[str, Any], dtype: str) -> None:
    assert spec_from_config({**QWEN3, **changes}).dtypes == (dtype,)


@pytest.mark.parametrize(
    ("given", "ours"), [("silu", "silu"), ("swish", "silu"), ("gelu", "gelu"), ("gelu_pytorch_tanh", "gelu_tanh")]
)
def test_activation_names(given: str, ours: str) -> None:
    assert spec_from_config({**QWEN3, "hidden_act": given}).activation.name == ours


def test_field_as_saved_by_transformers() -> None:
    config = {key: value for key, value in QWEN3.items() if key != "num_experts"}
    assert spec_from_config({**config, "num_local_experts": 64}).shapes[0].num_experts == 64


@pytest.mark.parametrize(
    ("clamps", "slug"),
    [(None, "silu"), ([], "silu"), ([0.0, None], "silu"), ([7.0, 7.0], "swiglustep"), ([9, 9], "swiglustep_limit9")],
)
def test_step_flash_clamps(clamps: list[float] | None, slug: str) -> None:
    assert spec_from_config({**STEP3P5, "swiglu_limits": clamps}).activation.slug == slug


def test_parameters_come_from_the_file() -> None:
    spec = spec_from_config({**load("gpt-oss-20b"), "swiglu_alpha": 1.5, "swiglu_limit": 9})
    assert spec.activation == Activation.of("swigluoai", alpha=1.5, limit=9)
    text = {**load("kimi-k3")["text_config"], "activation_situ_linear_beta": None, "routed_expert_hidden_size": None}
    spec = spec_from_config(text)
    assert spec.activation == Activation.of("situ", beta=4)
    assert spec.shapes[0].hidden_size == 7168


def test_path_forms_and_names(tmp_path: Path) -> None:
    folder = tmp_path / "Qwen3-30B-A3B (copy)"
    cached = tmp_path / "models--Qwen--Qwen3-30B-A3B" / "snapshots" / "0123abcd"
    for place in (folder, cached):
        place.mkdir(parents=True)
        (place / "config.json").write_text(json.dumps(QWEN3), encoding="utf-8")
    assert spec_from_config(folder).name == "qwen3-30b-a3b-copy"
    assert spec_from_config(str(folder / "config.json")).name == "qwen3-30b-a3b-copy"
    assert spec_from_config(cached).name == "qwen3-30b-a3b"
    assert spec_from_config({**QWEN3, "_name_or_path": "Qwen/Qwen3-30B-A3B"}).name == "qwen3-30b-a3b"
    assert spec_from_config(QWEN3).name == "qwen3_moe"


@pytest.mark.parametrize(
    ("config", "parts"),
    [
        (
            {"model_type": "llama", "hidden_size": 8},
            ["model_type: 'llama'", "mixtral", "keys seen: hidden_size, model"],
        ),
        ({"hidden_size": 8}, ["model_type: None is not known", "keys seen: hidden_size"]),
        ({"model_type": ["mixtral"]}, ["model_type: ['mixtral'] is not known"]),
        ({**QWEN3, "num_experts": None}, ["num_experts or num_local_experts: missing", "keys seen: hidden_act, "]),
        ({**QWEN3, "num_local_experts": 64}, ["num_experts / num_local_experts", "128", "64", "disagree"]),
        ({**QWEN3, "num_experts_per_tok": 200}, ["top_k: 200", "from 1 to 32"]),
        ({**QWEN3, "num_experts_per_tok": [8, 6]}, ["num_experts_per_tok: [8, 6]", "the same in every layer"]),
        ({**QWEN3, "num_experts_per_tok": []}, ["num_experts_per_tok: []"]),
        ({**QWEN3, "hidden_act": "quick_gelu"}, ["hidden_act: 'quick_gelu'", "allowed: silu, swish"]),
        ({**QWEN3, "hidden_act": "relu2"}, ["hidden_act: 'relu2'"]),
        ({**QWEN3, "hidden_act": None}, ["hidden_act: missing", "keys seen"]),
        ({**QWEN3, "hidden_size": "2048"}, ["hidden_size: '2048'", "an integer"]),
        ({**QWEN3, "torch_dtype": "float8_e4m3fn"}, ["torch_dtype: 'float8_e4m3fn'", "bfloat16, float16, float32"]),
        ({"model_type": "mistral3", "text_config": {"model_type": "mistral"}}, ["model_type: 'mistral'"]),
        ({**STEP3P5, "swiglu_limits": [0.0, 7.0]}, ["swiglu_limits: layers differ (0, 7)", "step-3.7-flash-clamped"]),
        ({**STEP3P5, "swiglu_limits": [0, "7"]}, ["swiglu_limits[1]: '7'", "a number above 0"]),
        ({**STEP3P5, "swiglu_limits": 7.0}, ["swiglu_limits: 7.0 is not allowed; allowed: a list"]),
        ({**load("gpt-oss-20b"), "swiglu_limit": -7}, ["swiglu_limit: -7 is not allowed; allowed: a number above 0"]),
        ({**load("gpt-oss-20b"), "swiglu_alpha": True}, ["swiglu_alpha: True is not allowed"]),
    ],
)
def test_refused(config: dict[str, Any], parts: list[str]) -> None:
    with pytest.raises(SpecError) as caught:
        spec_from_config(config)
    for part in ["config: ", *parts]:
        assert part in str(caught.value)


@pytest.mark.parametrize(
    ("sample", "key"),
    [
        ("gpt-oss-20b", "swiglu_limit"),
        ("deepseek-v4-flash", "swiglu_limit"),
        ("nemotron-3-nano-30b-a3b", "mlp_hidden_act"),
        ("phi-3.5-moe", "intermediate_size"),
        ("ernie-4.5-21b-a3b", "moe_k"),
        ("longcat-flash", "expert_ffn_hidden_size"),
        ("mimo-v2-flash", "hidden_size"),
    ],
)
def test_missing_field_is_never_guessed(sample: str, key: str) -> None:
    config = load(sample)
    del config[key]
    with pytest.raises(SpecError, match=f"{key}: missing; keys seen: "):
        spec_from_config(config)


def test_ungated_family_refuses_gated_names() -> None:
    with pytest.raises(SpecError, match=r"mlp_hidden_act: 'silu' is not allowed; allowed: relu2"):
        spec_from_config({**load("nemotron-3-nano-30b-a3b"), "mlp_hidden_act": "silu"})


@pytest.mark.parametrize(
    ("text", "part"), [("{", "config.json:1: not valid JSON"), ("[1]", "a JSON object"), (None, "no such file")]
)
def test_bad_files(tmp_path: Path, text: str | None, part: str) -> None:
    path = tmp_path / "config.json"
    if text is not None:
        path.write_text(text, encoding="utf-8")
    with pytest.raises(SpecError) as caught:
        spec_from_config(path)
    assert str(path) in str(caught.value)
    assert part in str(caught.value)


def test_families_are_sorted() -> None:
    assert list(FAMILIES) == sorted(FAMILIES)
