"""Read a Hugging Face config.json: one row a family says which fields hold the routed experts.

A released config.json and one saved by transformers may name a field differently, so a row lists every name that the
family uses. What no row covers is an error: a wrong shape would build, run and be wrong.
"""

import json
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from moegen.runtime.activations import Activation
from moegen.spec import DTYPES, MoESpec, Shape, SpecError

Config = Mapping[str, Any]

# transformers' name -> ours, for the gated form
_ACTIVATIONS = {"silu": "silu", "swish": "silu", "gelu": "gelu", "gelu_pytorch_tanh": "gelu_tanh"}
_UNGATED = {"relu2": "relu2_no_mul"}


@dataclass(frozen=True, slots=True, kw_only=True)
class Family:
    """Where one model family keeps its experts; a dot in a name goes into a nested mapping.

    latent names an optional field that, when set, is what experts read and write in place of hidden.
    """

    experts: tuple[str, ...]
    top_k: tuple[str, ...] = ("num_experts_per_tok",)
    hidden: tuple[str, ...] = ("hidden_size",)
    intermediate: tuple[str, ...] = ("moe_intermediate_size",)
    activation: Callable[[Config], Activation]
    bias: bool = False
    latent: str | None = None


def _named(key: str, names: Mapping[str, str] = _ACTIVATIONS, default: str | None = None) -> Callable[[Config], str]:
    """A reader of the field `key`; `default` is for families whose configuration class fixes or fills it."""

    def read(config: Config) -> str:
        value = _optional(config, key)
        if value is None and default is not None:
            return default
        value = _required(config, (key,))
        if not isinstance(value, str) or value not in names:
            raise SpecError(f"{key}: {value!r} is not allowed; allowed: {', '.join(names)}")
        return names[value]

    return read


def _plain(
    key: str = "hidden_act", names: Mapping[str, str] = _ACTIVATIONS, default: str | None = None
) -> Callable[[Config], Activation]:
    read = _named(key, names, default)
    return lambda config: Activation.of(read(config))


def _clamped_silu(config: Config) -> Activation:
    _named("hidden_act", {"silu": "silu"})(config)
    return Activation.of("silu", limit=_number("swiglu_limit", _required(config, ("swiglu_limit",))))


def _gpt_oss(config: Config) -> Activation:
    # the alpha of released checkpoints is that of the model code; only newer files write it down
    alpha = _number("swiglu_alpha", _optional(config, "swiglu_alpha"))
    return Activation.of("swigluoai", alpha=alpha, limit=_number("swiglu_limit", _required(config, ("swiglu_limit",))))


def _minimax_m3(config: Config) -> Activation:
    alpha = _number("swiglu_alpha", _required(config, ("swiglu_alpha",)))
    limit = _number("swiglu_limit", _required(config, ("swiglu_limit",)))
    # the model code adds 1 to up whatever the config says
    return Activation.of("swigluoai_uninterleave", alpha=alpha, beta=1.0, limit=limit)


def _kimi(config: Config) -> Activation:
    name = _named("hidden_act", {**_ACTIVATIONS, "situ": "situ"})(config)
    if name != "situ":
        return Activation.of(name)
    beta = _number("activation_situ_beta", _required(config, ("activation_situ_beta",)))
    limit = _number("activation_situ_linear_beta", _optional(config, "activation_situ_linear_beta"))
    return Activation.of("situ", beta=beta, limit=limit)


def _step_flash(config: Config) -> Activation:
    limits = _optional(config, "swiglu_limits") or []
    if not isinstance(limits, list):
        raise SpecError(f"swiglu_limits: {limits!r} is not allowed; allowed: a list, one number a layer")
    # 0 and null both mean that a layer does not clamp
    clamps = {_number(f"swiglu_limits[{layer}]", limit or None) for layer, limit in enumerate(limits)}
    if len(clamps) > 1:
        shown = ", ".join(f"{limit:g}" for limit in sorted(limit or 0 for limit in clamps))
        raise SpecError(
            f"swiglu_limits: layers differ ({shown}) and a package has one activation; "
            "allowed: two packages, of the models step-3.7-flash and step-3.7-flash-clamped"
        )
    plain = _named("hidden_act", {"silu": "silu"}, default="silu")(config)
    limit = clamps.pop() if clamps else None
    return Activation.of(plain) if limit is None else Activation.of("swiglustep", limit=limit)


_QWEN = Family(experts=("num_experts", "num_local_experts"), activation=_plain())
_DEEPSEEK = Family(experts=("n_routed_experts",), activation=_plain())
_MIXTRAL = Family(
    experts=("num_local_experts", "num_experts"), intermediate=("intermediate_size",), activation=_plain()
)
_CLAMPED = Family(experts=("n_routed_experts",), activation=_clamped_silu)
_STEP3 = Family(experts=("moe_num_experts",), top_k=("moe_top_k",), activation=_plain(default="silu"))
_STEP_FLASH = Family(
    experts=("moe_num_experts", "n_routed_experts"),
    top_k=("moe_top_k", "num_experts_per_tok"),
    activation=_step_flash,
)
_MINIMAX_M3 = Family(experts=("num_local_experts",), intermediate=("intermediate_size",), activation=_minimax_m3)
_KIMI_LINEAR = Family(
    experts=("num_experts", "num_local_experts"),
    top_k=("num_experts_per_token", "num_experts_per_tok"),
    activation=_kimi,
    latent="routed_expert_hidden_size",
)

FAMILIES: dict[str, Family] = {
    "bailing_moe": _QWEN,
    "bailing_moe_v2": _QWEN,
    "dbrx": Family(
        experts=("ffn_config.moe_num_experts",),
        top_k=("ffn_config.moe_top_k",),
        hidden=("d_model",),
        intermediate=("ffn_config.ffn_hidden_size",),
        activation=_plain("ffn_config.ffn_act_fn.name", default="silu"),
    ),
    "deepseek_v2": _DEEPSEEK,
    "deepseek_v3": _DEEPSEEK,
    "deepseek_v32": _DEEPSEEK,
    "deepseek_v4": _CLAMPED,
    "dots1": _DEEPSEEK,
    "ernie4_5_moe": Family(experts=("moe_num_experts",), top_k=("moe_k",), activation=_plain()),
    "gemma4": Family(experts=("num_experts",), top_k=("top_k_experts",), activation=_plain("hidden_activation")),
    "glm4_moe": _DEEPSEEK,
    "glm4_moe_lite": _DEEPSEEK,
    "glm4v_moe": _DEEPSEEK,
    "glm5_next": _CLAMPED,
    "glm_moe_dsa": _DEEPSEEK,
    "gpt_oss": Family(
        experts=("num_local_experts",), intermediate=("intermediate_size",), activation=_gpt_oss, bias=True
    ),
    "granitemoe": _MIXTRAL,
    "granitemoehybrid": _MIXTRAL,
    "granitemoeshared": _MIXTRAL,
    "hunyuan_v1_moe": Family(
        experts=("num_experts",),
        top_k=("moe_topk", "num_experts_per_tok"),
        intermediate=("intermediate_size",),
        activation=_plain(),
    ),
    "hy_v3": _QWEN,
    "jamba": _MIXTRAL,
    "kimi_k2": _DEEPSEEK,
    "kimi_k3": _KIMI_LINEAR,
    "kimi_linear": _KIMI_LINEAR,
    "lfm2_moe": Family(experts=("num_experts",), activation=_plain(default="silu")),
    "llama4": _MIXTRAL,
    "longcat_flash": Family(
        experts=("n_routed_experts",),
        top_k=("moe_topk",),
        intermediate=("expert_ffn_hidden_size",),
        activation=_plain(default="silu"),
    ),
    "mimo_v2_flash": _DEEPSEEK,
    "minimax": _MIXTRAL,
    "minimax_m2": _MIXTRAL,
    "minimax_m3_vl": _MINIMAX_M3,
    "mistral4": _DEEPSEEK,
    "mixtral": _MIXTRAL,
    "nemotron_h": Family(
        experts=("n_routed_experts",), activation=_plain("mlp_hidden_act", _UNGATED), latent="moe_latent_size"
    ),
    "olmoe": Family(experts=("num_experts",), intermediate=("intermediate_size",), activation=_plain()),
    "phimoe": _MIXTRAL,
    "qwen2_moe": _QWEN,
    "qwen3_5_moe": _QWEN,
    "qwen3_moe": _QWEN,
    "qwen3_next": _QWEN,
    "qwen3_omni_moe": _QWEN,
    "qwen3_vl_moe": _QWEN,
    "solar_open": _DEEPSEEK,
    "step3": _STEP3,
    "step3_vl": _STEP3,
    "step3p5": _STEP_FLASH,
    "step3p7": _STEP_FLASH,
}


def spec_from_config(source: str | Path | Config) -> MoESpec:
    """The spec of the routed experts in a transformers config.json: a file, the folder that holds it, or its contents.

    Covers the model types of `FAMILIES`; in a multimodal config, the language part. dtypes is the file's `dtype` or
    `torch_dtype`, bfloat16 without one. A `quantization_config` is not read: quant stays ("none",).
    Raises SpecError for an unreadable file, an unknown model type, or a field that is missing or of no use.
    """
    if isinstance(source, Mapping):
        return _spec(source, "", "config")
    path = Path(source)
    path = path / "config.json" if path.is_dir() else path
    try:
        config = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise SpecError(f"{path}: no such file") from None
    except (OSError, UnicodeDecodeError) as error:
        raise SpecError(f"{path}: cannot be read: {error}") from error
    except json.JSONDecodeError as error:
        raise SpecError(f"{path}:{error.lineno}: not valid JSON: {error.msg}") from error
    if not isinstance(config, dict):
        raise SpecError(f"{path}: {config!r} is not allowed; allowed: a JSON object")
    return _spec(config, _name_from_path(path.resolve()), str(path))


def _spec(config: Config, name: str, where: str) -> MoESpec:
    levels = [config]
    for key in ("thinker_config", "text_config"):
        if isinstance(inner := levels[-1].get(key), Mapping):
            levels.append(inner)
    text = levels[-1]
    try:
        family_name, family = _family(levels)
        top_name = str(config.get("_name_or_path") or "").rstrip("/").rsplit("/", 1)[-1]
        return MoESpec(
            name=_slug(name) or _slug(top_name) or _slug(family_name),
            shapes=(_shape(text, family),),
            dtypes=(_dtype(levels),),
            activation=family.activation(text),
            bias=family.bias,
        )
    except SpecError as error:
        raise SpecError(f"{where}: {error}") from None


def _family(levels: list[Config]) -> tuple[str, Family]:
    # the innermost type decides: a multimodal wrapper such as mistral3 holds dense models too
    value = next((level["model_type"] for level in reversed(levels) if level.get("model_type")), None)
    name = str(value).removesuffix("_text")
    if name not in FAMILIES:
        seen = ", ".join(sorted(levels[-1]))
        raise SpecError(f"model_type: {value!r} is not known; allowed: {', '.join(FAMILIES)}; keys seen: {seen}")
    return name, FAMILIES[name]


def _shape(config: Config, family: Family) -> Shape:
    hidden = _optional(config, family.latent) if family.latent else None
    return Shape(
        num_experts=_same_in_all_layers(config, family.experts),
        top_k=_same_in_all_layers(config, family.top_k),
        hidden_size=_same_in_all_layers(config, family.hidden) if hidden is None else hidden,
        intermediate_size=_same_in_all_layers(config, family.intermediate),
    )


def _same_in_all_layers(config: Config, keys: tuple[str, ...]) -> int:
    """The number under one of the names; some files give a list, one number a layer. Shape checks the rest."""
    value = _required(config, keys)
    if not isinstance(value, list):
        return value  # type: ignore[no-any-return]
    if not value or any(item != value[0] for item in value):
        raise SpecError(f"{' / '.join(keys)}: {value!r} is not allowed; allowed: a number, the same in every layer")
    return value[0]  # type: ignore[no-any-return]


def _required(config: Config, keys: tuple[str, ...]) -> Any:  # noqa: ANN401 - a JSON value
    found = {key: value for key in keys if (value := _optional(config, key)) is not None}
    if not found:
        raise SpecError(f"{' or '.join(keys)}: missing; keys seen: {', '.join(sorted(config))}")
    first = next(iter(found.values()))
    if any(value != first for value in found.values()):
        raise SpecError(f"{' / '.join(found)}: {found!r} disagree; allowed: one value under all names")
    return first


def _optional(config: Config, key: str) -> Any:  # noqa: ANN401 - a JSON value
    value: Any = config
    for part in key.split("."):
        value = value.get(part) if isinstance(value, Mapping) else None
    return value


def _number(key: str, value: object) -> float | None:
    """A parameter of an activation; None stays None, so that optional ones pass through."""
    if value is None:
        return None
    if isinstance(value, bool) or not isinstance(value, int | float) or not 0 < value < float("inf"):
        raise SpecError(f"{key}: {value!r} is not allowed; allowed: a number above 0")
    return float(value)


def _dtype(levels: list[Config]) -> str:
    for config in reversed(levels):
        for key in ("dtype", "torch_dtype"):
            value = config.get(key)
            if value is None:
                continue
            if value not in DTYPES:
                raise SpecError(f"{key}: {value!r} is not allowed; allowed: {', '.join(DTYPES)}")
            return str(value)
    return "bfloat16"


def _name_from_path(path: Path) -> str:
    if path.name != "config.json":
        return path.stem
    if path.parent.parent.name == "snapshots":  # the hub cache: models--owner--name/snapshots/<commit>/config.json
        return path.parents[2].name.rsplit("--", 1)[-1]
    return path.parent.name


def _slug(name: str) -> str:
    return re.sub(r"[^a-z0-9._-]+", "-", name.lower()).lstrip("._-").rstrip("-")
