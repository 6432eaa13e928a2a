"""The activations that sit between the two GEMMs of an expert: names, shapes and parameters (no torch here).

Formulas: `reference.py` for torch, `templates/kernels/activations/<name>.py.jinja` for Triton. g is the gate, u is up,
x is the only input of an un-gated activation, s() is the logistic function; all arithmetic is float32.
"""

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class ActivationKind:
    """One row: how w13 is laid out for it and which parameters it takes.

    gated        w13 has 2I rows and two values make one; otherwise I rows
    interleaved  gated rows are stored g0, u0, g1, u1, … instead of all gate rows and then all up rows
    parameters   accepted parameters with their defaults; None = optional and off, `REQUIRED` = must be given
    """

    gated: bool = True
    interleaved: bool = False
    parameters: tuple[tuple[str, float | None], ...] = ()


REQUIRED = float("nan")

ACTIVATIONS: dict[str, ActivationKind] = {
    # g * s(g) * u; with limit L (DeepSeek-V4: 10) first g = min(g, L) and u = clamp(u, -L, L)
    "silu": ActivationKind(parameters=(("limit", None),)),
    # erf form of gelu(g) * u
    "gelu": ActivationKind(),
    # tanh form of gelu(g) * u; Hugging Face calls it gelu_pytorch_tanh
    "gelu_tanh": ActivationKind(),
    # gpt-oss: g = min(g, L), u = clamp(u, -L, L), (u + beta) * g * s(alpha * g)
    "swigluoai": ActivationKind(interleaved=True, parameters=(("alpha", 1.702), ("beta", 1.0), ("limit", 7.0))),
    # MiniMax-M3: the same formula on packed rows, with vLLM's own defaults
    "swigluoai_uninterleave": ActivationKind(parameters=(("alpha", 1.0), ("beta", 0.0), ("limit", REQUIRED))),
    # Step-3.5: min(silu(g), L) * clamp(u, -L, L): the clamp comes after silu
    "swiglustep": ActivationKind(parameters=(("limit", 7.0),)),
    # Kimi-K3: beta * tanh(g / beta) * s(g) * (limit * tanh(u / limit), or u without a limit)
    "situ": ActivationKind(parameters=(("beta", REQUIRED), ("limit", None))),
    "silu_no_mul": ActivationKind(gated=False),
    "gelu_no_mul": ActivationKind(gated=False),
    "gelu_tanh_no_mul": ActivationKind(gated=False),
    # Nemotron: max(x, 0) squared
    "relu2_no_mul": ActivationKind(gated=False),
}


@dataclass(frozen=True, slots=True)
class Activation:
    """One activation with all its parameters resolved; build it with `Activation.of`."""

    name: str = "silu"
    alpha: float | None = None
    beta: float | None = None
    limit: float | None = None

    @classmethod
    def of(cls, name: str, **parameters: float | None) -> "Activation":
        """Fill in defaults; ValueError names an unknown activation, parameter, or one that is missing or not finite."""
        kind = ACTIVATIONS.get(name)
        if kind is None:
            hint = " (relu2 exists un-gated only: relu2_no_mul)" if name == "relu2" else ""
            raise ValueError(f"activation: {name!r} is unknown{hint}; allowed: {', '.join(ACTIVATIONS)}")
        values = dict(kind.parameters)
        for key, value in parameters.items():
            if value is None:
                continue
            if key not in values:
                allowed = ", ".join(values) or "no parameters"
                raise ValueError(f"activation.{key}: {value!r} is not a parameter of {name}; allowed: {allowed}")
            if (
                isinstance(value, bool)
                or not isinstance(value, (int, float))
                or value != value
                or abs(value) == float("inf")
            ):
                raise ValueError(f"activation.{key}: {value!r} is not allowed; allowed: a finite number")
            if key == "limit" and value <= 0:
                raise ValueError(f"activation.limit: {value!r} is not allowed; allowed: a number above 0")
            values[key] = float(value)
        missing = [key for key, value in values.items() if value is not None and value != value]
        if missing:
            raise ValueError(f"activation.{missing[0]}: missing; {name} has no default for it")
        return cls(name, **values)

    @property
    def gated(self) -> bool:
        """Whether w13 holds gate and up rows."""
        return ACTIVATIONS[self.name].gated

    @property
    def interleaved(self) -> bool:
        """Whether gate and up rows come by turns."""
        return ACTIVATIONS[self.name].interleaved

    @property
    def parameters(self) -> dict[str, float]:
        """The parameters that are on, in the order alpha, beta, limit."""
        named = {"alpha": self.alpha, "beta": self.beta, "limit": self.limit}
        return {key: value for key, value in named.items() if value is not None}

    @property
    def slug(self) -> str:
        """`silu`, or with parameters other than the defaults `silu_limit10`."""
        defaults = dict(ACTIVATIONS[self.name].parameters)
        own = [f"{key}{value:g}" for key, value in self.parameters.items() if defaults.get(key) != value]
        return "_".join([self.name, *own]).replace(".", "p").replace("-", "m")
