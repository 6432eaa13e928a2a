"""DeviceFacts: what tile choice and legality need to know of a GPU."""

import functools
import re
from dataclasses import dataclass

import torch


@dataclass(frozen=True, slots=True)
class DeviceFacts:
    """One GPU model.

    name           as the driver reports it
    backend        "cuda" or "hip"
    arch           "90" for compute capability 9.0, "gfx942" for AMD
    num_sms        streaming multiprocessors (compute units)
    shared_memory  bytes that one block may use
    """

    name: str
    backend: str
    arch: str
    num_sms: int
    shared_memory: int

    @property
    def slug(self) -> str:
        """Folder name of this GPU's config records: `nvidia-h200`."""
        return re.sub(r"[^a-z0-9]+", "-", self.name.lower()).strip("-")

    @property
    def has_pdl(self) -> bool:
        """Whether a kernel may start before the previous one has ended (compute capability 9.0 and newer)."""
        return self.backend == "cuda" and int(self.arch) >= 90

    @property
    def has_float8(self) -> bool:
        """Whether Triton has e4m3 values there (compute capability 8.9 and newer; AMD)."""
        return self.backend == "hip" or int(self.arch) >= 89

    @property
    def has_wgmma(self) -> bool:
        """Whether tensor cores take operands from shared memory, 64 rows at a time (compute capability 9.0)."""
        return self.backend == "cuda" and self.arch == "90"


@functools.cache
def device_facts(index: int) -> DeviceFacts:
    """Facts of GPU number `index` of this process, read from torch once."""
    properties = torch.cuda.get_device_properties(index)
    if torch.version.hip is not None:
        backend, arch = "hip", properties.gcnArchName.split(":")[0]
    else:
        backend, arch = "cuda", f"{properties.major}{properties.minor}"
    shared_memory = getattr(properties, "shared_memory_per_block_optin", 65536)
    return DeviceFacts(properties.name, backend, arch, properties.multi_processor_count, shared_memory)
