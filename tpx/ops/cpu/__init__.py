"""The operations on a CPU, in C++ that is built at first use; without a compiler torch runs them.

`native(x, ...)` says whether it can take these tensors; the references lie beside it, in ops/.
"""

from .calls import INTEGERS, Native, native, references

__all__ = ["INTEGERS", "Native", "native", "references"]
