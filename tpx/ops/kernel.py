"""What runs an operation instead of its reference: a module with the functions that
kernels/operations.py lists, or None."""

from __future__ import annotations

from collections.abc import Mapping
from types import MappingProxyType
from typing import Any

Kernel = Any
Kernels = Mapping[str, Kernel]  # by operation; the reference runs what is not there
REFERENCE: Kernels = MappingProxyType({})
