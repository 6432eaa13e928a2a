"""SGLang's tuned files: `E=…,N=…,device_name=…[,dtype=…][,block_shape=[…]][,per_channel_quant=True][_down].json`.

As SGLang 0.5.23 looks them up below `configs/triton_X_Y_Z/`: one file for the up GEMM (gemm1 here) and one, with
`_down`, for the down GEMM; both have one BLOCK_SIZE_M, as in moegen.
"""

from collections.abc import Mapping
from pathlib import Path

from moegen.interop.strict import FileError
from moegen.interop.table import table_text
from moegen.runtime.tile import LayerTiles
from moegen.spec import VariantSpec

DTYPES = ("fp8_w8a8", "int8_w8a8", "int8_w8a16", "int4_w4a16")
DOWN = "_down.json"


def device_name(gpu: str) -> str:
    """The GPU's name as SGLang writes it."""
    return gpu.replace(" ", "_")


def file_name(variant: VariantSpec, gpu: str) -> str:
    """The name of the up GEMM's file; FileError for a scheme that SGLang has no file for.

    `gpu` is the name as `device_name` gives it.
    """
    scheme = variant.scheme
    if scheme.kind == "tensor_token" or (scheme.kind and scheme.mode not in DTYPES):
        raise FileError(f"{variant.slug}: SGLang has no tuned file for {scheme.name}")
    dtype = scheme.mode if scheme.kind else "float32" if variant.dtype == "float32" else ""
    block = scheme.block_shape
    stored = variant.intermediate_size // scheme.row.values_per_byte  # the width of w2 as stored
    parts = [f"E={variant.local_experts}", f"N={stored}", f"device_name={gpu}"]
    parts += [f"dtype={dtype}"] if dtype else []
    parts += [f"block_shape=[{block[0]}, {block[1]}]"] if block is not None and all(block) else []
    parts += ["per_channel_quant=True"] if scheme.kind == "channel" and scheme.row.activation else []
    return ",".join(parts) + ".json"


def down_name(name: str) -> str:
    """The down GEMM's file beside the up GEMM's."""
    return name.removesuffix(".json") + DOWN


def export(
    variant: VariantSpec,
    gpu: str,
    tiles: Mapping[int, LayerTiles],
    versions: Mapping[int, str],
) -> dict[Path, str]:
    """Path below the output folder -> text: two files for each Triton version, which names their folder.

    gpu is the driver's name. FileError as in `file_name`, and for a token count without a version.
    """
    name, texts = file_name(variant, device_name(gpu)), {}
    for version in sorted(set(versions.values())):
        if not version:
            raise FileError(f"{variant.slug}: no Triton version is stated, which names SGLang's folder")
        folder = Path(f"triton_{version.replace('.', '_')}")
        own = {tokens: pair for tokens, pair in tiles.items() if versions[tokens] == version}
        texts[folder / name] = table_text({tokens: pair.gemm1 for tokens, pair in own.items()}, {})
        texts[folder / down_name(name)] = table_text({tokens: pair.gemm2 for tokens, pair in own.items()}, {})
    return texts
