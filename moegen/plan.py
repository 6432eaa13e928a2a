"""spec -> plan: which kernel modules a package holds and which layer runs on which module."""

from dataclasses import dataclass

from moegen.quant import KernelQuant, kernel_quant
from moegen.runtime.activations import Activation
from moegen.spec import MoESpec, VariantSpec


@dataclass(frozen=True, slots=True, kw_only=True)
class KernelModule:
    """One generated `_kernels_*.py`: gemm1 and gemm2 of one quant mode and activation."""

    name: str
    quant: KernelQuant
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
    """Plan the package of `spec`: one kernel module per quant scheme, since tile sizes and shapes stay constexpr."""
    modules: dict[str, KernelModule] = {}
    layers = []
    for variant in spec.variants():
        scheme = variant.scheme
        if variant.quant not in modules:
            parts = ["_kernels", *([scheme.slug] if scheme.kind else []), variant.activation.slug]
            quant = kernel_quant(scheme)
            modules[variant.quant] = KernelModule(name="_".join(parts), quant=quant, activation=variant.activation)
        layers.append(PlannedLayer(variant=variant, module=modules[variant.quant].name))
    return Plan(spec=spec, modules=tuple(modules.values()), layers=tuple(layers))
