"""Processes that compile and the one that launches have to ask Triton's cache for the same keys."""

from collections.abc import Callable
from pathlib import Path
from types import ModuleType

from moegen.emit import emit
from moegen.load import _forget, import_package
from moegen.plan import make_plan
from moegen.tune.cache_keys import settle_cache_keys
from tests.support.packages import spec_of

Prepare = Callable[[ModuleType], object]


def keys(folder: Path, ops: tuple[str, ...], prepare: Prepare) -> dict[str, str]:
    """The keys of a layer's GEMMs in a process that has just imported the package and meets them in this order."""
    _forget(folder.name)
    module = import_package(folder)
    prepare(module)
    return {op: getattr(module.LAYERS[0].kernels, op).cache_key for op in ops}


def test_keys_do_not_depend_on_what_was_compiled_before(tmp_path: Path) -> None:
    folder = emit(make_plan(spec_of(quant=("nvfp4_w4a16:g16",))), tmp_path)

    def differ(prepare: Prepare) -> bool:
        return keys(folder, ("gemm1", "gemm2"), prepare) != keys(folder, ("gemm2", "gemm1"), prepare)

    assert differ(lambda _: None), "Triton's keys do not depend on order any more: cache_keys.py can go"
    assert not differ(settle_cache_keys)
