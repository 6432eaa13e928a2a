"""The quant modes: one row each. The row is the only place that says what a mode stores, reads and tolerates."""

from dataclasses import dataclass


@dataclass(frozen=True, slots=True, kw_only=True)
class QuantMode:
    """One quant mode.

    name       as in specs, on the command line and in config records
    template   the grouped-GEMM skeleton that reads its weights; gemm1 and gemm2 extend it
    """

    name: str
    template: str


QUANT_MODES: dict[str, QuantMode] = {
    "none": QuantMode(name="none", template="kernels/grouped_gemm.py.jinja"),
}
