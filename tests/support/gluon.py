"""The kernel of the family "stream" run as ordinary Python on torch tensors: what it computes, without layouts, rings
and barriers. Blocks run one after another, the whole grid twice: as far as its barrier, then with the `hidden` of that.
"""

import ast
import functools
import inspect
import itertools
import types
from collections.abc import Callable
from types import ModuleType, SimpleNamespace
from typing import Any

import torch
import triton
import triton.language as tl

from moegen.runtime import stream, stream_kernel, stream_rows
from moegen.runtime.stream_sizes import StreamSizes
from moegen.runtime.weight import scale_bytes


class _OnTensors(ast.NodeTransformer):
    """Of a kernel's function: nothing is changed in place, as in the language, and no tensor has a layout."""

    def visit_AugAssign(self, node: ast.AugAssign) -> ast.AST:
        assert isinstance(node.target, ast.Name)
        before = ast.Name(node.target.id, ast.Load())
        return ast.Assign([node.target], ast.BinOp(before, node.op, self.visit(node.value)))

    def visit_Attribute(self, node: ast.Attribute) -> ast.AST:
        self.generic_visit(node)
        return ast.Name("_type", ast.Load()) if node.attr == "type" else node

    def visit_FunctionDef(self, node: ast.FunctionDef) -> ast.AST:
        node.decorator_list = []
        return self.generic_visit(node)


@functools.cache
def _code_on_tensors(function: types.FunctionType) -> types.CodeType:
    lines, first = inspect.getsourcelines(function)
    tree = _OnTensors().visit(ast.parse("from __future__ import annotations\n" + "".join(lines)))
    ast.increment_lineno(ast.fix_missing_locations(tree), first - 2)
    names: dict[str, Any] = {}
    exec(compile(tree, function.__code__.co_filename, "exec"), names)  # noqa: S102
    code = names[function.__name__].__code__
    assert isinstance(code, types.CodeType)
    return code


class Pointer:
    """A pointer, or a block of them, into a contiguous tensor."""

    def __init__(self, memory: torch.Tensor, offset: Any = 0) -> None:
        self.memory, self.offset = memory, offset
        self.dtype = SimpleNamespace(element_ty=memory.dtype)

    def __add__(self, offset: Any) -> "Pointer":
        return Pointer(self.memory, self.offset + offset)


class Shared:
    """Shared memory."""

    layout = None

    def __init__(self, memory: torch.Tensor) -> None:
        self.memory, self.shape, self.dtype = memory, list(memory.shape), memory.dtype

    def index(self, index: Any) -> "Shared":
        return Shared(self.memory[int(index)])

    def permute(self, order: tuple[int, ...]) -> "Shared":
        return Shared(self.memory.permute(order))

    def load(self, _layout: object) -> torch.Tensor:
        return self.memory.clone()

    def store(self, values: torch.Tensor) -> None:
        assert values.dtype == self.dtype
        assert values.shape == self.memory.shape
        self.memory.copy_(values)

    def _reinterpret(self, dtype: torch.dtype, shape: list[int], _layout: object) -> "Shared":
        assert dtype == self.dtype
        return Shared(self.memory.view(shape))


class Ring:
    """What one warp loads and others take, in order, as the rows of products."""

    def __init__(self, sizes: StreamSizes, dtype: torch.dtype) -> None:
        self.sizes, self.dtype = sizes, dtype
        self.loaded: list[torch.Tensor] = []

    def index(self, _stage: object) -> "Ring":
        return self

    def load(self, desc: Any, live: Any, expert: Any, row: Any, part: Any, *_: object) -> None:
        """Nothing is loaded unless live: there is what was there before, anything."""
        if live:
            start = [expert, 0, row, part, 0] if self.sizes.whole else [expert, 0, row, part * self.sizes.part]
            block = read_block(desc, start)
        else:
            block = torch.full(desc.block_shape, 77 if self.dtype == torch.int8 else float("nan")).to(self.dtype)
        self.loaded.append(block.reshape(-1, self.sizes.part))

    def take(self) -> torch.Tensor:
        tile = self.loaded.pop(0)
        while len(tile) < self.sizes.rows:
            tile = torch.cat((tile.view(torch.uint8), self.loaded.pop(0).view(torch.uint8))).view(self.dtype)
        assert len(tile) == self.sizes.rows
        return tile


def read_block(descriptor: Any, start: list[Any]) -> torch.Tensor:
    """A block of a descriptor; zero outside."""
    seen = torch.as_strided(descriptor.base, descriptor.shape, descriptor.strides, descriptor.base.storage_offset())
    block = torch.zeros(descriptor.block_shape, dtype=seen.dtype)
    where = [slice(int(a), int(a) + size) for a, size in zip(start, descriptor.block_shape, strict=True)]
    inside = seen[tuple(where)]
    block[tuple(slice(0, size) for size in inside.shape)] = inside
    return block


def load(pointer: Pointer, mask: Any = None, other: Any = 0, **_: object) -> Any:
    index = torch.as_tensor(pointer.offset)
    mask = torch.as_tensor(True if mask is None else mask).expand(index.shape)
    memory = pointer.memory.flatten()
    plain = memory.view(torch.uint8) if memory.dtype.itemsize == 1 else memory  # torch indexes no float8
    found = torch.full(index.shape, other, dtype=plain.dtype)
    found[mask] = plain[index[mask]]  # what is masked may lie outside
    return found.view(memory.dtype)


def _store(pointer: Pointer, values: torch.Tensor, mask: Any = None) -> None:
    index, values = torch.broadcast_tensors(torch.as_tensor(pointer.offset), values)
    mask = torch.as_tensor(True if mask is None else mask).expand(index.shape)
    assert values.dtype == pointer.memory.dtype
    plain = torch.uint8 if values.dtype.itemsize == 1 else values.dtype
    pointer.memory.view(-1).view(plain)[index[mask]] = values.view(plain)[mask]


def _where(condition: Any, one: Any, other: Any) -> Any:
    if isinstance(condition, bool):
        return one if condition else other
    return torch.where(condition, one, other)


def _product(ring: Ring, window: Shared, zero: torch.Tensor, **_: object) -> torch.Tensor:
    return (ring.take().float() @ window.memory.float()).to(zero.dtype)


def _either(pick: Callable[..., Any], a: Any, b: Any) -> Any:
    return pick(torch.as_tensor(a), torch.as_tensor(b))


def language(block: int, blocks: int) -> SimpleNamespace:
    """As much of `gl` as the kernels use."""
    nothing = lambda *_, **__: None  # noqa: E731
    dtypes = {name: getattr(torch, name) for name in ("float32", "bfloat16", "int8", "uint8", "int32", "int64")}
    return SimpleNamespace(
        **dtypes,
        constexpr=int,
        static_range=range,
        program_id=lambda _: block,
        num_programs=lambda _: blocks,
        BlockedLayout=nothing,
        NVMMADistributedLayout=nothing,
        SliceLayout=nothing,
        arange=lambda start, end, **_: torch.arange(start, end),
        zeros=lambda shape, dtype, **_: torch.zeros(shape, dtype=dtype),
        expand_dims=lambda values, axis: values.unsqueeze(axis),
        reshape=lambda values, shape: values.reshape(shape),
        permute=lambda values, order: values.permute(order),
        convert_layout=lambda values, _, **__: values,
        broadcast=torch.broadcast_tensors,
        split=lambda values: values.unbind(-1),
        sum=lambda values, axis: values.sum(axis, dtype=values.dtype),
        max=lambda values, axis: values.amax(axis),
        abs=torch.abs,
        minimum=lambda a, b: _either(torch.minimum, a, b),
        maximum=lambda a, b: _either(torch.maximum, a, b),
        where=_where,
        load=load,
        store=_store,
    )


def _group_scale(largest: torch.Tensor, least: float, most: float, ue8m0: bool) -> torch.Tensor:
    step = largest.clamp_min(least) / most
    return torch.exp2(torch.ceil(torch.log2(step))) if ue8m0 else step


def _to_8_bit(scaled: torch.Tensor, most: float, dtype: torch.dtype) -> torch.Tensor:
    scaled = scaled.clamp(-most, most)
    return ((scaled + 0.5).floor() if dtype == torch.int8 else scaled).to(dtype)


def _decode_scale(stored: torch.Tensor) -> torch.Tensor:
    return torch.exp2(stored.float() - 127) if stored.dtype == torch.uint8 else stored.float()


def as_python(block: int, blocks: int, **more: Any) -> Callable[[ModuleType], SimpleNamespace]:
    """The functions of a kernel's module as Python functions of one block; `more` stands in for further globals."""
    nothing = lambda *_, **__: None  # noqa: E731
    stand_ins: dict[str, Any] = {
        "gl": language(block, blocks),
        "mbarrier": SimpleNamespace(wait=nothing, arrive=nothing),
        "asm": nothing,
        "block_barrier": nothing,
        "wait_for_previous": nothing,
        "fetch_descriptors": nothing,
        "fence_async_shared": nothing,
        "buffers_of": lambda _, ring: ring,
        "load_parts": lambda *arguments: arguments[6].load(*arguments[:5]),
        "item": lambda buffer, index: buffer.memory[int(index), 0],
        "warpgroup_mma": _product,
        "warpgroup_mma_wait": lambda _, deps: deps[0],
        "group_scale": _group_scale,
        "divide": lambda values, step: values / step,
        "to_8_bit": _to_8_bit,
        "decode_scale": _decode_scale,
        "_type": SimpleNamespace(layout=SimpleNamespace(parent=None)),
        **more,
    }
    made: dict[str, dict[str, Any]] = {}

    def globals_of(module: dict[str, Any]) -> dict[str, Any]:
        name = module["__name__"]
        if name not in made:
            made[name] = own = {**module, **stand_ins}
            for key, value in module.items():
                if isinstance(value, tl.constexpr):
                    own[key] = value.value
                elif isinstance(value, triton.JITFunction) and key not in stand_ins:
                    function = value.fn
                    own[key] = types.FunctionType(_code_on_tensors(function), globals_of(function.__globals__), key)
        return made[name]

    return lambda module: SimpleNamespace(**globals_of(vars(module)))


class _BarrierError(Exception):
    """Where a block waits for all others, which have not begun."""


def _end_of_gemm1(*_: object) -> None:
    raise _BarrierError


def run_as_python(
    sizes: StreamSizes,
    call: Any,
    activation: Callable[..., torch.Tensor],
    blocks: int = 66,
) -> torch.Tensor:
    """call.out of a whole launch of `blocks` blocks, from a Call on CPU tensors; memory that nobody wrote is NaN."""
    x, w13, w2 = call.hidden_states, call.w13, call.w2
    hidden = torch.full((sizes.slots, sizes.intermediate_size), float("nan"), dtype=x.dtype)
    descriptors = [stream._weight_descriptor(w.values, x, sizes, w is w13) for w in (w13, w2)]
    routing = tuple(None if t is None else Pointer(t) for t in (call.topk_weights, call.topk_ids, call.expert_map))
    biases = [None if w.bias is None else Pointer(w.bias) for w in (w13, w2)]
    static = [None if w.input_scale is None else Pointer(w.input_scale) for w in (w13, w2)]
    for first, block in itertools.product((True, False), range(blocks)):
        more = {"weigh_parts": _end_of_gemm1} if first else {}
        kernel, ring = as_python(block, blocks, **more)(stream_kernel), Ring(sizes, w13.values.dtype)
        tiles = (ring, ring, ring)
        kernel._stream_weights(*descriptors, routing, tiles, None, sizes)
        shared = _shared_memory(sizes, w13.values.dtype)
        if sizes.quantised:
            scales = [Pointer(scale_bytes(w.scale)) for w in (w13, w2)]
            kernel.gather_scales(*scales, routing, shared[2], SimpleNamespace(index=lambda _: None), sizes)
        signals = (SimpleNamespace(index=lambda _: None), None, None)
        try:
            kernel._multiply(
                Pointer(x.contiguous()), *static, *biases, Pointer(hidden), Pointer(call.out), call.out.stride(0),
                routing, tiles, shared, signals, activation, sizes,
            )  # fmt: skip
            assert not ring.loaded, "a tile was loaded that nobody took"
        except _BarrierError:
            assert first
    return call.out


def _shared_memory(sizes: StreamSizes, dtype: torch.dtype) -> tuple[Any, ...]:
    """What stream_layer allocates beside the ring."""
    nan = float("nan")

    def filled(*shape: int) -> Shared:
        return Shared(torch.full(shape, nan))

    def table(units: int, entries: int) -> Shared:
        return filled(units, *((1, entries * sizes.entry, 2) if sizes.group_k else (entries, 2, sizes.entry)))

    rows = [
        (Shared(torch.zeros(count, sizes.segment, sizes.part, dtype=dtype)), filled(count, sizes.segment))
        for count in (sizes.segments1, sizes.segments2)
    ]
    tables = (table(sizes.most_units1, sizes.entries1), table(sizes.most_units2, sizes.entries2))
    experts = Shared(torch.zeros(sizes.slot_room, 1, dtype=torch.int32))
    return *rows, tables, filled(sizes.segments2, sizes.segment), experts


def quantise_as_python(
    sizes: StreamSizes,
    dtype: torch.dtype,
    source: torch.Tensor,
    static_scale: torch.Tensor | None = None,
    topk_ids: torch.Tensor | None = None,
) -> torch.Tensor:
    """What one block makes of x [T, H] or, with its topk_ids [T, k], of `hidden` [T·k, I]: dequantised, float32."""
    first = topk_ids is None
    values, steps = _shared_memory(sizes, dtype)[0 if first else 1]
    routing = (None, None if topk_ids is None else Pointer(topk_ids), None)
    static = None if static_scale is None else Pointer(static_scale)
    kernel = as_python(0, 1)(stream_rows)
    loaded = kernel.load_segment(Pointer(source), 0, first, sizes)
    kernel.quantise_rows(Pointer(source), loaded, static, routing, values, steps, first, sizes)
    found = (values.memory.float() * steps.memory.unsqueeze(2)).flatten(0, 1)
    if first:
        return found[: sizes.x_parts].view(len(source), -1)[:, : source.shape[1]]
    by_token = found[: sizes.tokens * sizes.token_parts].view(sizes.tokens, sizes.token_parts, -1)
    by_slot = by_token[:, : sizes.top_k * sizes.hidden_parts].reshape(sizes.slots, -1)
    return by_slot[:, : source.shape[1]]
