"""Scheme: how the weights of a layer are stored and how its activations are quantised. No torch here.

Every scale multiplies: real = (stored - zero) * scale. Layouts in words: docs/modes.md.
"""

import math
import re
from dataclasses import dataclass

FP8 = ("float8_e4m3fn", "float8_e4m3fnuz")  # fnuz: AMD gfx942
E8M0 = ("uint8", "float8_e8m0fnu")  # an exponent byte: 2 ** (byte - 127)

# How weight values share a scale, as written after the colon of `mode:granularity`.
GRANULARITIES = {
    "tensor": re.compile(r"tensor"),  # one scale an expert; activations one a tensor
    "tensor_token": re.compile(r"tensor_token"),  # one scale an expert; activations one a token
    "channel": re.compile(r"channel"),  # one scale a weight row; activations one a token
    "NxK": re.compile(r"(?P<n>\d+)x(?P<k>\d+)(?P<ue8m0>ue8m0)?"),  # block; activations one a token and K group
    "gK": re.compile(r"g(?P<k>\d+)(?P<zeros>z)?"),  # one scale a row and K group; z: with zero points
}


@dataclass(frozen=True, slots=True)
class Mode:
    """One quant mode: everything about it that does not depend on the granularity.

    weight           torch dtypes that the stored weights may have
    values_per_byte  2 for 4-bit weights (along K; the low nibble has the even k), else 1
    scale            torch dtypes of the weight scales; "activation" stands for that of hidden_states
    activation       what activations are quantised to before each GEMM: fp8, int8, mxfp8 or None
    granularities    keys of GRANULARITIES
    default          granularity of a bare mode name
    groups           allowed K groups of gK; empty: any
    zero_points      whether gK may have them
    """

    weight: tuple[str, ...] = ()
    values_per_byte: int = 1
    scale: tuple[str, ...] = ()
    activation: str | None = None
    granularities: tuple[str, ...] = ()
    default: str = ""
    groups: tuple[int, ...] = ()
    zero_points: bool = False


_FLOAT = ("float32", "activation")
MODES: dict[str, Mode] = {
    "none": Mode(),
    "fp8_w8a8": Mode(FP8, 1, ("float32", *E8M0), "fp8", ("tensor", "tensor_token", "channel", "NxK"), "128x128"),
    "int8_w8a8": Mode(("int8",), 1, ("float32",), "int8", ("channel", "tensor", "NxK"), "channel"),
    "int8_w8a16": Mode(("int8", "uint8"), 1, _FLOAT, None, ("channel", "gK"), "channel", zero_points=True),
    "int4_w4a16": Mode(("uint8",), 2, _FLOAT, None, ("gK",), "g128", (32, 64, 128), zero_points=True),
    "mxfp4_w4a16": Mode(("uint8",), 2, E8M0, None, ("gK",), "g32", (32,)),
    "mxfp4_w4a8": Mode(("uint8",), 2, E8M0, "mxfp8", ("gK",), "g32", (32,)),
    "nvfp4_w4a16": Mode(("uint8",), 2, ("float8_e4m3fn",), None, ("gK",), "g16", (16,)),
    "mxfp8": Mode(("float8_e4m3fn",), 1, E8M0, None, ("gK",), "g32", (32,)),
}


@dataclass(frozen=True, slots=True)
class Scheme:
    """One quant mode at one granularity; build it with `Scheme.parse`.

    kind      key of GRANULARITIES, or "" for unquantised weights
    group_n   weight rows that share a scale; 0 = all
    group_k   reduction steps that share a scale; 0 = all
    """

    mode: str = "none"
    kind: str = ""
    group_n: int = 0
    group_k: int = 0
    zero_points: bool = False
    ue8m0: bool = False

    @classmethod
    def parse(cls, text: str) -> "Scheme":
        """Read `mode` or `mode:granularity`; ValueError names what is unknown and what is supported."""
        name, _, granularity = text.partition(":")
        mode = MODES.get(name)
        if mode is None:
            raise ValueError(f"{text!r} is not supported; allowed: {', '.join(MODES)}")
        granularity = granularity or mode.default
        for kind in mode.granularities:
            match = GRANULARITIES[kind].fullmatch(granularity)
            if match is not None:
                return cls._checked(text, name, kind, match.groupdict())
        if granularity:
            raise ValueError(f"{text!r} is not supported; {name} has: {', '.join(mode.granularities) or 'none'}")
        return cls()

    @classmethod
    def _checked(cls, text: str, name: str, kind: str, found: dict[str, str | None]) -> "Scheme":
        mode = MODES[name]
        group_n = int(found.get("n") or (1 if kind in ("channel", "gK") else 0))
        group_k = int(found.get("k") or 0)
        if kind == "gK" and mode.groups and group_k not in mode.groups:
            raise ValueError(f"{text!r} is not supported; {name} has K groups of {', '.join(map(str, mode.groups))}")
        least = 32 if kind == "NxK" else 16  # an 8-bit tensor-core product takes 32 steps
        if kind in ("NxK", "gK") and (group_n < 1 or group_k < least or group_k & (group_k - 1)):
            raise ValueError(f"{text!r} is not supported; allowed: a K group that is a power of two from {least}")
        if found.get("zeros") and not mode.zero_points:
            raise ValueError(f"{text!r} is not supported; {name} has no zero points")
        if found.get("ue8m0") and mode.activation != "fp8":
            raise ValueError(f"{text!r} is not supported; ue8m0 scales are for fp8_w8a8")
        return cls(name, kind, group_n, group_k, bool(found.get("zeros")), bool(found.get("ue8m0")))

    @property
    def has_global_scale(self) -> bool:
        """Whether a float32 scale an expert multiplies the block scales (nvfp4)."""
        return self.mode == "nvfp4_w4a16"

    @property
    def uses_float8(self) -> bool:
        """Whether its kernels hold e4m3 values: weights, scales or activations."""
        return "float8_e4m3fn" in (*self.row.weight, *self.row.scale) or self.row.activation in ("fp8", "mxfp8")

    @property
    def weight_dtypes(self) -> tuple[str, ...]:
        """torch dtypes that the stored weights may have: int8_w8a16 is signed by row and biased by 128 by group."""
        if self.mode == "int8_w8a16":
            return ("int8",) if self.kind == "channel" else ("uint8",)
        return self.row.weight

    @property
    def scale_dtypes(self) -> tuple[str, ...]:
        """torch dtypes that the weight scales may have; "activation" stands for that of hidden_states."""
        if self.mode == "fp8_w8a8" and not self.ue8m0:
            return ("float32",)
        return self.row.scale

    @property
    def granularity(self) -> str:
        """The text after the colon."""
        if self.kind == "NxK":
            return f"{self.group_n}x{self.group_k}{'ue8m0' if self.ue8m0 else ''}"
        return f"g{self.group_k}{'z' if self.zero_points else ''}" if self.kind == "gK" else self.kind

    @property
    def name(self) -> str:
        """The text that `parse` reads: `fp8_w8a8:128x128`."""
        return f"{self.mode}:{self.granularity}" if self.kind else self.mode

    @property
    def slug(self) -> str:
        """For file names: `fp8_w8a8_128x128`."""
        return self.name.replace(":", "_")

    @property
    def row(self) -> Mode:
        """The mode's row of MODES."""
        return MODES[self.mode]

    @property
    def block_shape(self) -> tuple[int, int] | None:
        """[n, k] as vLLM states it: [0, group] for weight-only groups, None without K groups."""
        if self.group_k == 0:
            return None
        return (0 if self.kind == "gK" else self.group_n, self.group_k)

    def weight_shape(self, experts: int, rows: int, depth: int) -> tuple[int, int, int]:
        """Stored shape of a weight of `rows` x `depth` values an expert."""
        return (experts, rows, math.ceil(depth / self.row.values_per_byte))

    def scale_shape(self, experts: int, rows: int, depth: int) -> tuple[int, ...] | None:
        """Shape of the weight scales; None for unquantised weights."""
        if not self.kind:
            return None
        if self.group_n == 0:
            return (experts,)
        if self.group_k == 0:
            return (experts, rows)
        return (experts, math.ceil(rows / self.group_n), math.ceil(depth / self.group_k))

    def words(self, names: tuple[str, str]) -> str:
        """Shape of the weight scales in words, for messages; `names` are those of rows and depth."""
        rows, depth = names
        parts = ["E"]
        if self.group_n:
            parts.append(rows if self.group_n == 1 else f"ceil({rows}/{self.group_n})")
        if self.group_k:
            parts.append(f"ceil({depth}/{self.group_k})")
        return f"[{', '.join(parts)}]"

    def zeros_words(self, names: tuple[str, str]) -> str:
        """Shape of the zero points in words."""
        rows, depth = names
        packed = self.row.values_per_byte
        return f"[E, {rows if packed == 1 else f'ceil({rows}/{packed})'}, ceil({depth}/{self.group_k})]"

    def zeros_shape(self, experts: int, rows: int, depth: int) -> tuple[int, int, int] | None:
        """Shape of the uint8 zero points, packed along the rows like the weights along K; None without them."""
        if not self.zero_points:
            return None
        return (experts, math.ceil(rows / self.row.values_per_byte), math.ceil(depth / self.group_k))
