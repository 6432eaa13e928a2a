"""A package `vllm` with as much of vLLM's functions as the tuner asks for, and a process that runs it without a GPU."""

from pathlib import Path
from typing import Any

import torch

from moegen.bench.measure import Check, layer_reference
from moegen.bench.workload import LayerCall, draw_routing, draw_weights
from moegen.device import TARGETS
from moegen.load import import_package
from moegen.tune.engines import VllmKernels
from moegen.tune.gpu import Answer, Compare, Describe, Measure, Prepare, Setup, package_call, status_of
from moegen.tune.trial import Measurement

FUSED_MOE = '''
from contextlib import contextmanager

from moegen.runtime.reference import moe_reference
from moegen.runtime.activations import Activation

told = [None]
seen = []


@contextmanager
def override_config(config):
    """As vLLM's: what an exception leaves behind stays."""
    told.append(config)
    yield
    told.pop()


def get_config():
    return told[-1]


def fused_experts(hidden_states, w1, w2, topk_weights, topk_ids, activation=None, apply_router_weight_on_input=False,
                  global_num_experts=-1, expert_map=None, quant_config=None):
    """The reference, whatever the config, but for BLOCK_SIZE_N = 256: then something is wrong."""
    seen.append((dict(get_config()), quant_config))
    out = moe_reference(hidden_states, w1, w2, topk_weights, topk_ids, Activation.of("silu"))
    return out + (1 if get_config()["BLOCK_SIZE_N"] == 256 else 0)
'''
CONFIG = """
from types import SimpleNamespace


def fp8_w8a8_moe_quant_config(w1_scale, w2_scale, a1_scale=None, a2_scale=None, per_act_token_quant=False,
                              per_out_ch_quant=False, block_shape=None):
    assert block_shape is None or not (per_act_token_quant or per_out_ch_quant)
    return SimpleNamespace(w1_scale=w1_scale, w2_scale=w2_scale, per_act_token_quant=per_act_token_quant,
                           per_out_ch_quant=per_out_ch_quant, block_shape=block_shape)
"""
LAUNCHER = """
import triton
import triton.language as tl


@triton.jit
def fused_moe_kernel(a, b, c, BLOCK_SIZE_M: tl.constexpr, BLOCK_SIZE_N: tl.constexpr, MUL: tl.constexpr):
    offset = tl.arange(0, BLOCK_SIZE_M)
    tl.static_assert(BLOCK_SIZE_N < 256, "too wide")
    tl.store(c + offset, tl.load(a + offset) * MUL)


def invoke_fused_moe_triton_kernel(A, B, C, A_scale, B_scale, topk_weights, sorted_token_ids, expert_ids,
                                   num_tokens_post_padded, mul_routed_weight, top_k, config, compute_type,
                                   use_fp8_w8a8, use_int8_w8a8, use_int8_w8a16, use_int4_w4a16, per_channel_quant,
                                   block_shape=None, B_bias=None):
    tile = (config["BLOCK_SIZE_M"], config["BLOCK_SIZE_N"])
    fused_moe_kernel[(1,)](A, B, C, *tile, mul_routed_weight, num_warps=config["num_warps"])
"""


def write_vllm(folder: Path) -> None:
    """The package below `folder`, with what importlib.metadata asks for: version 0.33.0."""
    package = folder / "vllm" / "model_executor" / "layers" / "fused_moe"
    package.mkdir(parents=True)
    for inner in (folder / "vllm", package.parent.parent, package.parent):
        (inner / "__init__.py").touch()
    (package / "__init__.py").write_text(FUSED_MOE)
    (package / "config.py").write_text(CONFIG)
    (package / "fused_moe.py").write_text(LAUNCHER)
    facts = folder / "vllm-0.33.0.dist-info"
    facts.mkdir()
    (facts / "METADATA").write_text("Metadata-Version: 2.1\nName: vllm\nVersion: 0.33.0\n")


class FakeVllmGpu:
    """VllmWorker without a GPU: runs vLLM's functions on CPU tensors, checks the result, and makes up a time."""

    def __init__(self, setup: Setup) -> None:
        self.module = import_package(setup.folder)
        self.layer = next(layer for layer in self.module.LAYERS if layer.slug == setup.slug)
        self.kernels = VllmKernels(self.layer)

    def __call__(self, request: object) -> object:
        match request:
            case Describe():
                return TARGETS["cuda:90"]
            case Prepare(tokens):
                generator = torch.Generator().manual_seed(tokens)
                hidden = torch.randn(tokens, self.layer.hidden_size, generator=generator).to(self.layer.dtype)
                routing = draw_routing(tokens, self.layer.top_k, torch.zeros(self.layer.local_experts), generator)
                call = LayerCall(hidden, draw_weights(self.layer, generator), *routing)
                self.call, self.check = package_call(self.module, call), Check.of(self.layer, call, layer_reference)
                return "ready"
            case Measure(_, tiles, _):
                return Answer((self.measure(tiles.gemm1),))
            case Compare(_, finalists):
                return Answer(tuple(self.measure(tiles.gemm1) for tiles in finalists))
        raise TypeError(request)

    def measure(self, tile: Any) -> Measurement:
        """Fast for narrow tiles with few warps, as vLLM was told to use them."""
        from vllm.model_executor.layers import fused_moe

        try:
            self.check.verify(self.kernels(self.call, tile))
        except Exception as error:  # noqa: BLE001 - as in the process that is played here
            return Measurement(status_of(error), message=str(error))
        config, _ = fused_moe.seen[-1]
        return Measurement("ok", float(config["BLOCK_SIZE_N"] + config["num_warps"] + config["num_stages"]))
