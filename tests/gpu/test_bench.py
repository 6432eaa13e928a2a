"""The parts of the benchmark that only a device can show: graphs, cold weights, ceilings, one whole cell."""

from collections.abc import Iterator

import pytest
import torch

from moegen.bench.measure import Options, measure_cell
from moegen.bench.peers import PACKAGE, Candidate
from moegen.bench.roofline import measure_ceilings
from tests.support.fake_layer import FakeLayer

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA or HIP device: times kernels"),
]


def dense(
    x: torch.Tensor, w13: torch.Tensor, w2: torch.Tensor, weights: torch.Tensor, ids: torch.Tensor
) -> torch.Tensor:
    """All experts on all tokens, without data-dependent shapes: can be captured."""
    gate, up = torch.einsum("th,eih->eti", x, w13).chunk(2, dim=-1)
    out = torch.einsum("eti,ehi->teh", torch.nn.functional.silu(gate) * up, w2)
    share = torch.zeros(x.shape[0], w13.shape[0], device=x.device).scatter_(1, ids.long(), weights)
    return (out * share[:, :, None]).sum(1).to(x.dtype)


@pytest.fixture
def device() -> Iterator[torch.device]:
    with torch.inference_mode():
        yield torch.device("cuda", torch.cuda.current_device())


def test_ceilings_are_plausible(device: torch.device) -> None:
    ceilings = measure_ceilings(torch.bfloat16, device)
    assert 1e11 < ceilings.read_bytes_per_s < 2e13
    assert 1e13 < ceilings.flops_per_s < 1e16


@pytest.mark.parametrize("tokens", [1, 100])
def test_a_cell_is_checked_and_timed(device: torch.device, tokens: int) -> None:
    def unwritten(x: torch.Tensor, *_: torch.Tensor) -> torch.Tensor:
        return torch.empty_like(x)

    candidates = [Candidate(PACKAGE, dense), Candidate("unwritten", unwritten), Candidate("twin", dense)]
    ceilings = measure_ceilings(torch.bfloat16, device)
    cell = measure_cell(
        FakeLayer(num_experts=4, local_experts=4, top_k=4, hidden_size=1024, intermediate_size=512),
        tokens,
        "balanced",
        candidates,
        ceilings,
        device=device,
        options=Options(replays=5),
    )
    assert [result.status for result in cell.results] == ["ok", "wrong", "ok"], cell.results
    assert cell.sizes is not None
    assert cell.sizes.reuse_bytes >= 512e6
    assert cell.sizes.active_experts == 4
    fraction = cell.fraction(cell.result(PACKAGE))
    assert fraction is not None
    assert 0 < fraction < 1.1
    assert cell.ratio_to_package(cell.result("twin")) is not None
