"""spec -> plan: which kernel modules a package holds and which layer runs on which module."""

from dataclasses import dataclass

from moegen.quant import QUANT_MODES, QuantMode
from moegen.runtime.activations import Activation
from moegen.spec import MoESpec, VariantSpec


@dataclass(frozen=True, slots=True, kw_only=True)
class KernelModule:
    """One generated `_kernels_*.py`: gemm1 and gemm2 of one quant mode and activation."""

    name: str
    quant: QuantMode
    activation: Activation


@dataclass(frozen=True, slots=True, kw_only=True)
class PlannedLayer:
    """One layer of the package and the name of the module with its kernels."""

    variant: VariantSpec
    module: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Plan:
    """Everything that rendering needs; the same spec always gives the same plan."""

    spec: MoESpec
    modules: tuple[KernelModule, ...]
    layers: tuple[PlannedLayer, ...]

    @property
    def package_name(self) -> str:
        """Folder and import name of the package."""
        return f"moe_{self.spec.slug}"


def make_plan(spec: MoESpec) -> Plan:
    """Plan the package of `spec`: one kernel module per quant mode, since tile sizes and shapes stay constexpr."""
    modules = {
        mode: KernelModule(
            name=_module_name(mode, spec.activation), quant=QUANT_MODES[mode], activation=spec.activation
        )
        for mode in spec.quant
    }
    layers = tuple(PlannedLayer(variant=v, module=modules[v.quant].name) for v in spec.variants())
    return Plan(spec=spec, modules=tuple(modules.values()), layers=layers)


def _module_name(mode: str, activation: Activation) -> str:
    parts = ["_kernels", activation.slug] if mode == "none" else ["_kernels", mode, activation.slug]
    return "_".join(parts)
