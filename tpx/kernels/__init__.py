"""Which kernels run: what was asked for, what this machine has, and the modules themselves.

Decided from text, without torch; loaded.py alone imports a kernel's code. The packages lie in the
repository's kernels/ and cannot import tpx.
"""

from .choice import UNCALLED, Choice, Device, Kernels, as_called, choose, describe
from .loaded import Loaded, load
from .wanted import Wanted, read_wanted

__all__ = [
    "UNCALLED",
    "Choice",
    "Device",
    "Kernels",
    "Loaded",
    "Wanted",
    "as_called",
    "choose",
    "describe",
    "load",
    "read_wanted",
]
