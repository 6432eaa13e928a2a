"""Where results go: into config records, or into a file of another engine."""

from collections.abc import Sequence
from pathlib import Path
from typing import Protocol

from moegen.interop import vllm
from moegen.interop.table import read_table, table_text
from moegen.runtime.device import DeviceFacts
from moegen.runtime.tile import LayerTiles
from moegen.spec import VariantSpec
from moegen.tune.record import Record, TunedBucket, add_bucket, load_record, locked, replace_text


class Keeper(Protocol):
    """Takes the result of each bucket as it comes."""

    def earlier(self, variant: VariantSpec) -> dict[int, LayerTiles]:
        """What is there already, by token count. RecordError or FileError for a file that cannot be used."""

    def keep(self, variant: VariantSpec, tokens: int, bucket: TunedBucket) -> None:
        """Write one result beside the others."""

    def files(self, variant: VariantSpec) -> list[Path]:
        """The files of one layer that are there."""


class Records:
    """Config records below each of `folders`; the first one is read as well."""

    def __init__(self, folders: Sequence[Path], device: DeviceFacts) -> None:
        self._folders, self._device = folders, device

    def earlier(self, variant: VariantSpec) -> dict[int, LayerTiles]:
        """The tile configs of the first folder's record."""
        records = [load_record(path) for path in self.files(variant)]
        own = (self._folders[0] / Record(self._device, variant).name).exists()
        return {tokens: bucket.tiles for tokens, bucket in records[0].buckets.items()} if own else {}

    def keep(self, variant: VariantSpec, tokens: int, bucket: TunedBucket) -> None:
        """Write it into the record of every folder."""
        record = Record(self._device, variant)
        for folder in self._folders:
            add_bucket(folder / record.name, record, tokens, bucket)

    def files(self, variant: VariantSpec) -> list[Path]:
        """The layer's record in each folder that has one."""
        paths = [folder / Record(self._device, variant).name for folder in self._folders]
        return [path for path in paths if path.exists()]


class VllmFiles:
    """vLLM's tuned files in one folder. FileError for a layer that vLLM has no file for."""

    def __init__(self, folder: Path, device: DeviceFacts, triton: str) -> None:
        self._folder, self._gpu, self._triton = folder, vllm.device_name(device.name), triton

    def earlier(self, variant: VariantSpec) -> dict[int, LayerTiles]:
        """The tile configs of the layer's file, the same for both GEMMs."""
        return {tokens: LayerTiles(t, t) for path in self.files(variant) for tokens, t in read_table(path).items()}

    def keep(self, variant: VariantSpec, tokens: int, bucket: TunedBucket) -> None:
        """Write it into the layer's file."""
        path = self._path(variant)
        with locked(path):
            table = read_table(path) if path.exists() else {}
            replace_text(path, table_text({**table, tokens: bucket.tiles.gemm1}, {"triton_version": self._triton}))

    def files(self, variant: VariantSpec) -> list[Path]:
        """The layer's file, if it is there."""
        path = self._path(variant)
        return [path] if path.exists() else []

    def _path(self, variant: VariantSpec) -> Path:
        return self._folder / vllm.file_name(variant, self._gpu)
