"""Every entry of models.yaml is a layer that can be built, and is found by all its names."""

import json
import re
import subprocess
import sys
from collections import Counter
from pathlib import Path

import pytest

from moegen import cli, models
from moegen.emit import package_files
from moegen.models import Model, load_models, model_spec
from moegen.plan import make_plan
from moegen.runtime.activations import Activation
from moegen.runtime.quant import Scheme
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


QUANTISED = {name: model for name, model in MODELS.items() if set(model.quant) - {"none"}}


@pytest.mark.parametrize("model", MODELS.values(), ids=MODELS)
def test_schemes(model: Model) -> None:
    assert [Scheme.parse(name).name for name in model.quant] == list(model.quant)
    assert ("none" in model.quant) == ("bf16" in model.released)


@pytest.mark.parametrize("model", QUANTISED.values(), ids=QUANTISED)
def test_package_of_every_released_scheme_renders(model: Model) -> None:
    plan = make_plan(model_spec(model.name, (Parallel(), Parallel(ep=2)), quant=model.quant))
    assert [item.variant.quant for item in plan.layers] == list(model.quant) * 2
    files = package_files(plan)  # rendering checks that every module is Python
    assert {f"{module.name}.py" for module in plan.modules} <= set(files)
    assert len(plan.modules) == len(model.quant)


def combinations() -> list[tuple[str, str, str, str]]:
    """(scheme, activation, bias, rows of w13) that released models use, quantised ones only."""
    found = {
        (quant, model.activation.slug, "yes" if model.bias else "no", "2I" if model.activation.gated else "I")
        for model in MODELS.values()
        for quant in model.quant
        if quant != "none"
    }
    return sorted(found)


def test_docs_have_every_combination_of_scheme_and_layer() -> None:
    text = (Path(__file__).parents[2] / "docs" / "modes.md").read_text()
    rows = re.findall(r"^\| `(\S+)` \| `(\S+)` \| (yes|no) \| (2I|I) \| (.+?) \|", text, re.MULTILINE)
    assert sorted(row[:4] for row in rows) == combinations()
    for quant, activation, bias, _, shown in rows:
        users = [
            model.name
            for model in MODELS.values()
            if quant in model.quant and activation == model.activation.slug and (bias == "yes") == model.bias
        ]
        assert shown == ", ".join(users)


@pytest.mark.parametrize(
    ("quant", "message"),
    [
        ("none", r"m.quant: 'none' is not allowed; allowed: a list"),
        (["none", "fp9"], r"m.quant\[1\]: 'fp9' is not supported; allowed: none, fp8_w8a8"),
        (["fp8_w8a8", "fp8_w8a8:128x128"], r"m.quant\[1\]: .* each scheme once"),
    ],
)
def test_bad_schemes_are_refused(quant: object, message: str) -> None:
    with pytest.raises(SpecError, match=message):
        models._schemes(quant, "m.quant")


def test_build_all_released_schemes(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["build", "--model", "mixtral-8x7b", "--quant", "released", "-o", str(tmp_path)]) == 0
    manifest = json.loads((tmp_path / "moe_mixtral_8x7b" / "manifest.json").read_text())
    assert tuple(manifest["spec"]["quant"]) == MODELS["mixtral-8x7b"].quant
    assert cli.main(["list", "--quant"]) == 0
    lines = {line.split()[0]: line for line in capsys.readouterr().out.splitlines()}
    for model in MODELS.values():
        assert lines[model.name].endswith(f"  {', '.join(model.quant) or '?'}")


def test_released_needs_a_model_that_has_schemes(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = Path(__file__).parent / "data" / "hf" / "qwen3-30b-a3b.json"
    nothing = next(model.name for model in MODELS.values() if not model.quant)
    for source, message in (([str(file)], "not allowed for a file"), (["--model", nothing], "no released scheme")):
        assert cli.main(["build", *source, "--quant", "released", "-o", str(tmp_path)]) == 3
        assert message in capsys.readouterr().err
    assert list(tmp_path.iterdir()) == []


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
