"""Which kernels run: what was asked for, what this machine has, and the modules themselves.

Decided from text, without torch; loaded.py alone imports a kernel's code. The packages lie in the
repository's kernels/ and cannot import tpx.
"""

from .choice import Choice, Device, Kernels, choose, describe
from .loaded import Loaded, load
from .wanted import Wanted, read_wanted

__all__ = [
    "Choice",
    "Device",
    "Kernels",
    "Loaded",
    "Wanted",
    "choose",
    "describe",
    "load",
    "read_wanted",
]
