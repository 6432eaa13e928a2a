"""The layer in plain torch: the oracle of tests, benchmark and tuner, and the path of CPU tensors."""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import torch
from torch.nn import functional

from .activations import Activation
from .quant import Scheme
from .weight import Weight, dequantise, round_activations

UNQUANTISED = Scheme()


def moe_reference(
    hidden_states: torch.Tensor,
    w13: torch.Tensor,
    w2: torch.Tensor,
    topk_weights: torch.Tensor,
    topk_ids: torch.Tensor,
    activation: Activation,
    *,
    scheme: Scheme = UNQUANTISED,
    expert_map: torch.Tensor | None = None,
    apply_router_weight_on_input: bool = False,
    compute_dtype: torch.dtype = torch.float64,
    **named: torch.Tensor | None,
) -> torch.Tensor:
    """out[t] = sum_j weight[t,j] * (act(x[t] @ w13[e].T + b13[e]) @ w2[e].T + b2[e]), e = topk_ids[t,j].

    Shapes as in `fused_experts`, as are the further names (w13_scale, w2_bias, …); the result is [T, H] in
    `compute_dtype`. Weights are dequantised; where `scheme` quantises activations, they are rounded as it does, from
    the type of hidden_states. Nothing else is rounded in between. Slots with an id outside 0..E-1 or mapped to -1
    contribute zero. With `apply_router_weight_on_input` the weight multiplies x before w13 instead of the output (as
    in Llama 4), so a bias is not weighted.
    """
    first, second = Weight.of("w13", w13, named), Weight.of("w2", w2, named)
    slots = LiveSlots.of(topk_weights.to(compute_dtype), topk_ids, expert_map, w13.shape[0])
    x = round_activations(hidden_states.to(compute_dtype), scheme, w13.dtype, first.input_scale)
    hidden = reference_gemm1(x, first, slots, activation, scheme, apply_router_weight_on_input)
    if scheme.row.activation is not None:
        hidden = hidden.to(hidden_states.dtype).to(compute_dtype)  # what the quantiser reads
    hidden = round_activations(hidden, scheme, w2.dtype, second.input_scale)
    return reference_gemm2(hidden, second, slots, scheme, hidden_states.shape, not apply_router_weight_on_input)


@dataclass(frozen=True, slots=True)
class LiveSlots:
    """The slots that count, in (token, position) order.

    tokens, positions  int64 [n]
    experts            local ones, int64 [n]
    weight             routed weight [n, 1]
    """

    tokens: torch.Tensor
    positions: torch.Tensor
    experts: torch.Tensor
    weight: torch.Tensor

    @classmethod
    def of(
        cls, topk_weights: torch.Tensor, topk_ids: torch.Tensor, expert_map: torch.Tensor | None, num_experts: int
    ) -> "LiveSlots":
        """Slots whose id is valid and whose expert is one of `num_experts` local ones; shapes as in `fused_experts`."""
        ids = local_ids(topk_ids, expert_map, num_experts)
        tokens, positions = (ids >= 0).nonzero(as_tuple=True)
        return cls(tokens, positions, ids[tokens, positions], topk_weights[tokens, positions, None])


def reference_gemm1(
    x: torch.Tensor, w13: Weight, slots: LiveSlots, activation: Activation, scheme: Scheme, weighted: bool
) -> torch.Tensor:
    """x [T, H] -> hidden [n, I] of the live slots, in x's dtype; weighted: by the routed weight, before the bias."""
    hidden = x.new_empty((slots.tokens.numel(), w13.values.shape[1] // (2 if activation.gated else 1)))
    for expert, rows in _by_expert(slots.experts):
        part = x[slots.tokens[rows]] @ dequantise(w13, scheme, expert, x.shape[1]).to(x.dtype).T
        if weighted:
            part = part * slots.weight[rows]
        if w13.bias is not None:
            part = part + w13.bias[expert].to(x.dtype)
        hidden[rows] = apply_activation(part, activation)
    return hidden


def reference_gemm2(
    hidden: torch.Tensor, w2: Weight, slots: LiveSlots, scheme: Scheme, shape: Sequence[int], weighted: bool
) -> torch.Tensor:
    """hidden [n, I] of the live slots -> out [T, H] = `shape`, in hidden's dtype; weighted: by the routed weight."""
    out = torch.zeros(shape, dtype=hidden.dtype, device=hidden.device)
    for expert, rows in _by_expert(slots.experts):
        part = hidden[rows] @ dequantise(w2, scheme, expert, hidden.shape[1]).to(hidden.dtype).T
        if w2.bias is not None:
            part = part + w2.bias[expert].to(hidden.dtype)
        out.index_add_(0, slots.tokens[rows], part * slots.weight[rows] if weighted else part)
    return out


def _by_expert(experts: torch.Tensor) -> Iterator[tuple[int, torch.Tensor]]:
    """Each expert that occurs in `experts`, with the positions where it does."""
    for expert in torch.unique(experts).tolist():
        yield expert, (experts == expert).nonzero()[:, 0]


def local_ids(topk_ids: torch.Tensor, expert_map: torch.Tensor | None, num_experts: int) -> torch.Tensor:
    """Local expert of every slot, int64 [T, k]; -1 where the slot is padding, out of range or on another rank."""
    ids = topk_ids.long()
    limit = num_experts if expert_map is None else expert_map.numel()
    ids = torch.where((ids >= 0) & (ids < limit), ids, -1)
    if expert_map is not None:
        ids = torch.where(ids >= 0, expert_map.long()[ids.clamp(min=0)], -1)
        ids = torch.where(ids < num_experts, ids, -1)
    return ids


def apply_activation(x: torch.Tensor, activation: Activation) -> torch.Tensor:
    """[rows, 2I] -> [rows, I] for a gated activation, else [rows, I] -> [rows, I]; formulas in activations.py."""
    if not activation.gated:
        return _UNGATED[activation.name](x)
    if activation.interleaved:
        gate, up = x[..., 0::2], x[..., 1::2]
    else:
        gate, up = x.chunk(2, dim=-1)
    return _GATED[activation.name](gate, up, activation)


def _silu(gate: torch.Tensor, up: torch.Tensor, activation: Activation) -> torch.Tensor:
    if activation.limit is not None:
        gate, up = gate.clamp(max=activation.limit), up.clamp(-activation.limit, activation.limit)
    return functional.silu(gate) * up


def _swigluoai(gate: torch.Tensor, up: torch.Tensor, activation: Activation) -> torch.Tensor:
    limit, alpha, beta = activation.limit, activation.alpha, activation.beta
    assert limit is not None and alpha is not None and beta is not None  # noqa: S101 - Activation.of filled them in
    gate, up = gate.clamp(max=limit), up.clamp(-limit, limit)
    return (up + beta) * gate * torch.sigmoid(alpha * gate)


def _swiglustep(gate: torch.Tensor, up: torch.Tensor, activation: Activation) -> torch.Tensor:
    limit = activation.limit
    assert limit is not None  # noqa: S101 - Activation.of filled it in
    return functional.silu(gate).clamp(max=limit) * up.clamp(-limit, limit)


def _situ(gate: torch.Tensor, up: torch.Tensor, activation: Activation) -> torch.Tensor:
    beta, limit = activation.beta, activation.limit
    assert beta is not None  # noqa: S101 - Activation.of filled it in
    up = up if limit is None else limit * torch.tanh(up / limit)
    return beta * torch.tanh(gate / beta) * torch.sigmoid(gate) * up


_GATED: dict[str, Callable[[torch.Tensor, torch.Tensor, Activation], torch.Tensor]] = {
    "silu": _silu,
    "gelu": lambda gate, up, _: functional.gelu(gate) * up,
    "gelu_tanh": lambda gate, up, _: functional.gelu(gate, approximate="tanh") * up,
    "swigluoai": _swigluoai,
    "swigluoai_uninterleave": _swigluoai,
    "swiglustep": _swiglustep,
    "situ": _situ,
}
_UNGATED: dict[str, Callable[[torch.Tensor], torch.Tensor]] = {
    "silu_no_mul": functional.silu,
    "gelu_no_mul": functional.gelu,
    "gelu_tanh_no_mul": lambda x: functional.gelu(x, approximate="tanh"),
    "relu2_no_mul": lambda x: functional.relu(x) ** 2,
}
