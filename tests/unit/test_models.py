"""Every entry of models.yaml is a layer that can be built, and is found by all its names."""

import subprocess
import sys
from collections import Counter

import pytest

from moegen.models import Model, load_models, model_spec
from moegen.runtime.activations import Activation
from moegen.spec import Parallel, Shape, SpecError

MODELS = load_models()
SOURCES = {"aic", "tf", "mb", "code", "mem"}


def test_there_are_many() -> None:
    assert len(MODELS) >= 40


def test_names_are_unique() -> None:
    names = Counter(name for model in MODELS.values() for name in (model.name, *model.also))
    assert [name for name, count in names.items() if count > 1] == []


@pytest.mark.parametrize("model", MODELS.values(), ids=MODELS)
def test_entry(model: Model) -> None:
    assert isinstance(model.title, str)
    assert model.title
    assert set(model.source.split("/")) <= SOURCES
    assert all(isinstance(text, str) for text in (*model.also, *model.released, model.notes))
    for alias in (model.name, *model.also):
        assert model_spec(alias).name == model.name  # MoESpec refuses a name that is not lower-case


@pytest.mark.parametrize("model", MODELS.values(), ids=MODELS)
def test_variants_of_common_splits(model: Model) -> None:
    # every released layer splits over 2 GPUs either way; a size that does not is a typing mistake
    splits = (Parallel(), Parallel(tp=2), Parallel(ep=2))
    whole, by_tp, by_ep = model_spec(model.name, splits).variants()
    rows = 2 if model.activation.gated else 1
    size = model.shape
    assert whole.w13_shape == (size.num_experts, rows * size.intermediate_size, size.hidden_size)
    assert by_tp.w2_shape == (size.num_experts, size.hidden_size, size.intermediate_size // 2)
    assert by_ep.local_experts == size.num_experts // 2
    assert len({variant.slug for variant in (whole, by_tp, by_ep)}) == 3


@pytest.mark.parametrize(
    ("name", "sizes", "activation", "bias"),
    [
        ("qwen3-30b-a3b", (128, 8, 2048, 768), Activation.of("silu"), False),
        ("mixtral-8x7b", (8, 2, 4096, 14336), Activation.of("silu"), False),
        ("deepseek-r1", (256, 8, 7168, 2048), Activation.of("silu"), False),
        ("deepseek-v4-pro", (384, 6, 7168, 3072), Activation.of("silu", limit=10), False),
        ("gpt-oss-120b", (128, 4, 2880, 2880), Activation.of("swigluoai", alpha=1.702, limit=7), True),
        ("kimi-k3", (896, 16, 3584, 3072), Activation.of("situ", beta=4, limit=25), False),
        ("nemotron-3-super-120b-a12b", (512, 22, 1024, 2688), Activation.of("relu2_no_mul"), False),
        ("nemotron-3-ultra-550b", (512, 22, 2048, 5120), Activation.of("relu2_no_mul"), False),
        ("nemotron-3-nano-30b-a3b", (128, 6, 2688, 1856), Activation.of("relu2_no_mul"), False),
        ("gemma-4-26b-a4b", (128, 8, 2816, 704), Activation.of("gelu_tanh"), False),
    ],
)
def test_known_values(name: str, sizes: tuple[int, int, int, int], activation: Activation, bias: bool) -> None:
    spec = model_spec(name)
    experts, top_k, hidden, intermediate = sizes
    shape = Shape(num_experts=experts, top_k=top_k, hidden_size=hidden, intermediate_size=intermediate)
    assert spec.shapes == (shape,)
    assert spec.activation == activation
    assert spec.bias is bias
    assert spec.dtypes == ("bfloat16",)


def test_choices_are_passed_on() -> None:
    spec = model_spec("Qwen/Qwen3-30B-A3B", (Parallel(tp=4),), dtypes=("float16",))
    assert spec.name == "qwen3-30b-a3b"
    assert [variant.slug for variant in spec.variants()] == ["e128_k8_h2048_i192_fp16_silu"]


def test_unknown_name_has_close_matches() -> None:
    with pytest.raises(SpecError, match=r"model: 'qwen3-30b-a3' is unknown; close matches: qwen3-30b-a3b") as caught:
        model_spec("qwen3-30b-a3")
    assert "dbrx" not in str(caught.value)
    with pytest.raises(SpecError, match=r"model: 'zzz' is unknown"):
        model_spec("zzz")


def test_bad_split_names_the_model() -> None:
    with pytest.raises(SpecError, match=r"model qwen3-30b-a3b: parallel\[0\].tp: 5 .*intermediate_size = 768"):
        model_spec("qwen3-30b-a3b", (Parallel(tp=5),))


def test_callers_cannot_change_the_table() -> None:
    load_models().clear()
    assert len(load_models()) == len(MODELS)


def test_no_torch_is_imported() -> None:
    code = "import sys, moegen.spec, moegen.models, moegen.huggingface; sys.exit('torch' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], check=False)  # noqa: S603 - code of this file
    assert done.returncode == 0
