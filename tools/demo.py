"""`make demo`: build a small package with the command line, import it, run one layer, compare it with float64.

Runs on the GPU if there is one and on the CPU otherwise. Exits 1 when the result is wrong.
"""

import subprocess
import sys
import tempfile
from importlib import import_module
from pathlib import Path
from types import ModuleType

import torch
import triton

from moegen.load import import_package
from moegen.runtime.reference import moe_reference

SPEC = """\
name: demo
shapes:
  - {num_experts: 16, top_k: 4, hidden_size: 256, intermediate_size: 128}
dtypes: [bfloat16]
activation: silu
"""
TOKENS = (1, 8, 200)  # one takes the low-latency assignment, the others the aligned one
TOLERANCE = 2e-2  # ||out - reference|| / ||reference||, bfloat16


def main() -> int:
    """Build, import, run, compare; the exit code."""
    with tempfile.TemporaryDirectory(prefix="moegen-demo-") as folder:
        package = import_package(build(Path(folder)))
        device = "cuda" if torch.cuda.is_available() else "cpu"
        where = torch.cuda.get_device_name() if device == "cuda" else "CPU, where packages run a torch reference"
        print(f"torch {torch.__version__}, triton {triton.__version__}, device: {where}")
        if device == "cuda":
            package.warmup(max(TOKENS))
        passed = [run_layer(package, tokens, device) for tokens in TOKENS]
    print("demo: ok" if all(passed) else "demo: WRONG RESULT")
    return 0 if all(passed) else 1


def build(folder: Path) -> Path:
    """Build the package of SPEC as a user would, below `folder`; its path."""
    spec = folder / "demo.yaml"
    spec.write_text(SPEC)
    print(f"{SPEC}\n$ moegen build demo.yaml -o out")
    subprocess.run([sys.executable, "-m", "moegen", "build", str(spec), "-o", str(folder / "out")], check=True)  # noqa: S603
    return folder / "out" / "moe_demo"


def run_layer(package: ModuleType, tokens: int, device: str) -> bool:
    """Run one layer on random inputs, print what happened, tell whether it equals the reference."""
    layer = package.LAYERS[0]
    generator = torch.Generator().manual_seed(tokens)

    def random(*shape: int) -> torch.Tensor:
        return torch.randn(shape, generator=generator).to(layer.dtype).to(device)

    hidden_states = random(tokens, layer.hidden_size)
    w13 = random(*layer.w13_shape) / layer.hidden_size**0.5
    w2 = random(*layer.w2_shape) / layer.intermediate_size**0.5
    scores = torch.randn(tokens, layer.num_experts, generator=generator).softmax(-1).to(device)
    topk_weights, topk_ids = scores.topk(layer.top_k)
    topk_ids = topk_ids.int()
    out = package.fused_experts(hidden_states, w13, w2, topk_weights, topk_ids)

    reference = moe_reference(hidden_states, w13, w2, topk_weights, topk_ids, layer.activation)
    error = ((out.double() - reference).norm() / reference.norm()).item()
    runtime = import_module(f"{package.__name__}.runtime.layer")
    assignment = "low-latency" if runtime.is_low_latency(layer, tokens, None) else "aligned"
    path = f"{assignment} assignment" + ("" if device == "cuda" else " on a GPU")
    sizes = f"x {list(hidden_states.shape)}, w13 {list(w13.shape)}, w2 {list(w2.shape)}, top_k {layer.top_k}"
    print(f"  {sizes} -> {list(out.shape)}: {path}, relative error {error:.1e} (<= {TOLERANCE})")
    return bool(error <= TOLERANCE)  # False for NaN as well


if __name__ == "__main__":
    sys.exit(main())
