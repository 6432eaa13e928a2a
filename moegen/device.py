"""Targets that packages are compiled for ahead of time: facts of GPUs that need not be present."""

from dataclasses import replace

from moegen.runtime.device import DeviceFacts

# Vendors' figures: multiprocessors (compute units), bytes of shared memory (LDS) a block may use.
TARGETS: dict[str, DeviceFacts] = {
    "cuda:80": DeviceFacts("NVIDIA A100", "cuda", "80", 108, 166_912),
    "cuda:86": DeviceFacts("NVIDIA A40", "cuda", "86", 84, 101_376),
    "cuda:89": DeviceFacts("NVIDIA L40S", "cuda", "89", 142, 101_376),
    "cuda:90": DeviceFacts("NVIDIA H200", "cuda", "90", 132, 232_448),
    "cuda:100": DeviceFacts("NVIDIA B200", "cuda", "100", 148, 232_448),
    "cuda:120": DeviceFacts("NVIDIA RTX PRO 6000", "cuda", "120", 188, 101_376),
    "hip:gfx942": DeviceFacts("AMD Instinct MI300X", "hip", "gfx942", 304, 65_536),
    "hip:gfx950": DeviceFacts("AMD Instinct MI355X", "hip", "gfx950", 256, 163_840),
}


def target_facts(target: str) -> DeviceFacts:
    """Facts of a target such as `cuda:90`; ValueError lists the known ones."""
    if target not in TARGETS:
        raise ValueError(f"target: {target!r} is not allowed; allowed: {', '.join(TARGETS)}")
    return TARGETS[target]


def gpu_facts(name: str, arch: str) -> DeviceFacts:
    """Facts of a GPU by its name and architecture, as a config record states them; ValueError lists the known ones.

    What makes a tile config legal follows from the architecture, so a GPU of a known one need not have a row.
    """
    same = [facts for facts in TARGETS.values() if facts.arch == arch]
    if not same:
        raise ValueError(f"arch: {arch!r} is not known; known: {', '.join(facts.arch for facts in TARGETS.values())}")
    return replace(same[0], name=name)
