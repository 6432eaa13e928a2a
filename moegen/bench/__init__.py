"""The project's one timing method: cold-L2 CUDA graphs of whole layers, beside a measured roofline and named peers.

workload (what is run) -> measure (check, capture, time) -> report (table, JSON, CSV); run is the command.
This file stays free of torch, so that the command line can be parsed without it.
"""

ROUTINGS = ("balanced", "power_law")
DEFAULT_TOKENS = (1, 4, 16, 64, 256, 1024, 4096, 16384)
DEFAULT_REPLAYS = 20
DEFAULT_ALPHA = 1.2

__all__ = ["DEFAULT_ALPHA", "DEFAULT_REPLAYS", "DEFAULT_TOKENS", "ROUTINGS"]
