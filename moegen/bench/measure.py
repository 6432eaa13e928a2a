"""One cell of the benchmark: build the workload, check every candidate, then time them in turn."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import cast

import torch

from moegen.bench import DEFAULT_ALPHA, DEFAULT_REPLAYS
from moegen.bench.peers import PACKAGE, Candidate
from moegen.bench.roofline import Ceilings, Floor, dtype_name, floor
from moegen.bench.timing import CapturedCalls, Timing, ratio, release_memory, time_interleaved
from moegen.bench.workload import Layer, LayerCall, Sizes, Workload, build_workload, scheme_of, w13_rows
from moegen.runtime.activations import Activation
from moegen.runtime.reference import moe_reference

# ||out - ref|| / ||ref||. The float32 value leaves no room for TF32 (about 3e-4), which the floor does not use either.
TOLERANCES = {torch.bfloat16: 2e-2, torch.float16: 5e-3, torch.float32: 1e-4}
# With quantised activations the oracle itself is this uncertain: Hopper's fp8 tensor cores keep about 14 bits, so some
# per cent of the intermediate's values round to the neighbouring fp8 value, 6 to 12 % away. For one token of
# Qwen3-30B-A3B in block fp8, this project's kernels and vLLM's are 2.6e-2 and 2.7e-2 away from it.
QUANTISED_TOLERANCE = 4e-2
CHECKED_TOKENS = 64

Reference = Callable[..., torch.Tensor]
"""reference(layer, hidden_states, w13, w2, topk_weights, topk_ids, **kwargs) -> [T, H] in any floating dtype."""


@dataclass(frozen=True, slots=True)
class Options:
    """What is the same in all cells of a run."""

    replays: int = DEFAULT_REPLAYS
    seed: int = 0
    alpha: float = DEFAULT_ALPHA


@dataclass(frozen=True, slots=True)
class Result:
    """One provider in one cell: status 'ok' (timing is set), 'wrong' or 'error' (message says why)."""

    provider: str
    status: str
    timing: Timing | None = None
    relative_error: float | None = None  # None if nothing was compared
    message: str = ""


@dataclass(frozen=True, slots=True)
class Cell:
    """All results for one (layer, tokens, routing); sizes and floor are None if the workload could not be built."""

    layer: str
    dtype: str
    tokens: int
    routing: str
    results: tuple[Result, ...]
    sizes: Sizes | None = None
    floor: Floor | None = None

    def result(self, provider: str) -> Result:
        """The result of one provider. Raises KeyError."""
        for result in self.results:
            if result.provider == provider:
                return result
        raise KeyError(provider)

    def fraction(self, result: Result) -> float | None:
        """The floor over the measured time: 1 is as fast as the ceilings allow."""
        if self.floor is None or result.timing is None:
            return None
        return self.floor.us / result.timing.us_per_call

    def ratio_to_package(self, result: Result) -> float | None:
        """The provider's time over the package's, median over the rounds: above 1 the package is faster."""
        package = self.result(PACKAGE).timing
        if package is None or result.timing is None:
            return None
        return ratio(result.timing, package)


class WrongResultError(Exception):
    """A candidate's output is not the reference's."""

    def __init__(self, message: str, relative_error: float | None = None) -> None:
        super().__init__(message)
        self.relative_error = relative_error


def layer_reference(layer: Layer, *args: torch.Tensor, **kwargs: torch.Tensor) -> torch.Tensor:
    """moe_reference with the layer's activation and quant scheme, in float64."""
    hidden_states, w13, w2, topk_weights, topk_ids = args
    activation, scheme = cast(Activation, layer.activation), scheme_of(layer)
    return moe_reference(
        hidden_states,
        w13,
        w2,
        topk_weights,
        topk_ids,
        activation,
        scheme=scheme,
        **kwargs,  # type: ignore[arg-type]
    )


def tolerance(layer: Layer) -> float:
    """The largest relative error that passes the check."""
    return TOLERANCES[layer.dtype] if scheme_of(layer).row.activation is None else QUANTISED_TOLERANCE


def relative_error(out: torch.Tensor, expected: torch.Tensor) -> float:
    """||out - expected|| / ||expected|| in float64; NaN if either holds one."""
    expected = expected.double()
    return float((out.double() - expected).norm() / expected.norm())


@dataclass(frozen=True, slots=True)
class Check:
    """The reference's rows of one layer call: `rows` [n] int64 are the sampled tokens, `expected` is [n, H]."""

    rows: torch.Tensor
    expected: torch.Tensor
    shape: tuple[int, ...]
    tolerance: float

    @classmethod
    def of(cls, layer: Layer, call: LayerCall, reference: Reference) -> "Check":
        """Run the reference on at most CHECKED_TOKENS tokens, spread evenly with the first and the last among them.

        A scale of the whole tensor depends on every token: then the reference runs on all of them.
        """
        tokens = call.hidden_states.shape[0]
        rows = torch.linspace(0, tokens - 1, min(tokens, CHECKED_TOKENS), dtype=torch.float64).round().long()
        rows = rows.to(call.hidden_states.device)
        coupled = scheme_of(layer).kind == "tensor"
        sample = LayerCall(call.hidden_states[rows], call.weights, call.topk_weights[rows], call.topk_ids[rows])
        computed = (call if coupled else sample).run(lambda *args, **kwargs: reference(layer, *args, **kwargs))
        expected = cast(torch.Tensor, computed)
        return cls(rows, expected[rows] if coupled else expected, tuple(call.hidden_states.shape), tolerance(layer))

    def verify(self, output: object) -> float:
        """The relative error of `output` [T, H]. Raises WrongResultError if shape or error is wrong."""
        if not isinstance(output, torch.Tensor) or tuple(output.shape) != self.shape:
            got = list(output.shape) if isinstance(output, torch.Tensor) else type(output).__name__
            raise WrongResultError(f"must return a tensor {list(self.shape)}, got {got}")
        error = relative_error(output[self.rows], self.expected)
        if not error < self.tolerance:  # NaN is not below anything
            raise WrongResultError(f"relative error {error:.2e}, allowed {self.tolerance:.0e}", error)
        return error


def measure_cell(
    layer: Layer,
    tokens: int,
    routing: str,
    candidates: Sequence[Candidate],
    ceilings: Ceilings,
    *,
    device: torch.device,
    options: Options,
    reference: Reference | None = layer_reference,
) -> Cell:
    """Check and time all candidates on one workload. Candidates that fail are results, not exceptions.

    Without a reference nothing is compared and relative_error stays None. All memory of the cell is released.
    """
    release_memory()
    try:
        workload = build_workload(
            layer,
            tokens,
            routing,
            device=device,
            seed=options.seed,
            free_bytes=torch.cuda.mem_get_info(device)[0],
            candidates=len(candidates),
            alpha=options.alpha,
        )
        checks = _checks(layer, workload, reference)
    except (ValueError, MemoryError, RuntimeError) as error:  # torch's out-of-memory error is a RuntimeError
        failed = tuple(Result(candidate.name, "error", message=first_line(error)) for candidate in candidates)
        return Cell(layer.slug, dtype_name(layer.dtype), tokens, routing, failed)
    results = _measure(candidates, workload, checks, layer, options.replays)
    bound = floor(layer, tokens, workload.sizes.active_experts, ceilings)
    return Cell(layer.slug, dtype_name(layer.dtype), tokens, routing, results, workload.sizes, bound)


def first_line(error: BaseException) -> str:
    """`Type: first line of the message`."""
    return f"{type(error).__name__}: {error}".splitlines()[0]


def _checks(layer: Layer, workload: Workload, reference: Reference | None) -> tuple[Check, Check] | None:
    """The first call, run eagerly, and the last, as the graph leaves it."""
    if reference is None:
        return None
    return Check.of(layer, workload.calls[0], reference), Check.of(layer, workload.calls[-1], reference)


def _measure(
    candidates: Sequence[Candidate],
    workload: Workload,
    checks: tuple[Check, Check] | None,
    layer: Layer,
    replays: int,
) -> tuple[Result, ...]:
    """Capture and check each candidate, then time those that passed, interleaved."""
    results: dict[str, Result] = {}
    ready: dict[str, CapturedCalls] = {}
    for candidate in candidates:
        try:
            ready[candidate.name], error = _capture(candidate, workload, checks, layer)
            results[candidate.name] = Result(candidate.name, "ok", relative_error=error)
        except WrongResultError as wrong:
            results[candidate.name] = Result(
                candidate.name, "wrong", relative_error=wrong.relative_error, message=str(wrong)
            )
        except Exception as failure:  # noqa: BLE001  a candidate is foreign code: it becomes a row, the run goes on
            results[candidate.name] = Result(candidate.name, "error", message=first_line(failure))
    try:
        timings = time_interleaved(list(ready.values()), replays=replays)
    except RuntimeError as failure:  # a device error hits all graphs of the round: which one caused it is unknown
        timed = {name: Result(name, "error", message=first_line(failure)) for name in ready}
    else:
        timed = {
            name: Result(name, "ok", timing, results[name].relative_error)
            for name, timing in zip(ready, timings, strict=True)
        }
    return tuple(timed.get(candidate.name, results[candidate.name]) for candidate in candidates)


def _capture(
    candidate: Candidate, workload: Workload, checks: tuple[Check, Check] | None, layer: Layer
) -> tuple[CapturedCalls, float | None]:
    """Check one eager call, capture the graph, check what a replay of it writes; return it and the larger error."""
    calls = workload.bind(candidate.function)
    if checks is None:
        return CapturedCalls(calls), None
    _poison_free_memory(layer, workload.calls[0])
    error = checks[0].verify(calls[0]())
    captured = CapturedCalls(calls)
    captured.poison_outputs()
    captured.replay()
    torch.cuda.synchronize()
    # The last call: correct also if the candidate returns one and the same buffer from every call.
    return captured, max(error, checks[1].verify(captured.outputs[-1]))


def _poison_free_memory(layer: Layer, call: LayerCall) -> None:
    """Leave NaN in the memory that the candidate's buffers are likely to get from torch's caching allocator.

    All bits set are NaN in every floating dtype. Two blocks are freed again: one of the output's size, and one that
    holds all intermediates and that the allocator splits.
    """
    release_memory()
    output = call.hidden_states.numel() * layer.dtype.itemsize
    width = w13_rows(layer) + layer.intermediate_size + layer.hidden_size
    sizes = (output, output + call.topk_ids.numel() * width * layer.dtype.itemsize)
    blocks = [torch.full((size,), 0xFF, dtype=torch.uint8, device=call.hidden_states.device) for size in sizes]
    del blocks
