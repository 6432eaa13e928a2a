"""One Triton cache key a kernel, in the processes that compile and in the one that launches.

Triton (3.6 and 3.7) takes the constants of a callee into a kernel's key only if the callee has a key already
(`DependenciesFinder._update_hash` merges them before it asks for one). So a kernel's key depends on which kernels the
process met before, and what one process has compiled another one may not find.
"""

import importlib
import pkgutil
from types import ModuleType

from triton.runtime.jit import JITCallable


def settle_cache_keys(package: ModuleType) -> None:
    """Give all functions of an imported package their keys, in one order, before any kernel is compiled or launched."""
    names = sorted(module.name for module in pkgutil.iter_modules(package.runtime.__path__))
    runtime = [importlib.import_module(f"{package.__name__}.runtime.{name}") for name in names]
    for module in (*runtime, *(layer.kernels for layer in package.LAYERS)):
        for function in vars(module).values():
            if isinstance(function, JITCallable):
                _ = function.cache_key
