"""What is written down of a collective, where somebody listens. Knows no group."""

from __future__ import annotations

from typing import NamedTuple

from torch import Tensor


class Record(NamedTuple):
    """One collective as this rank called it; shape and nbytes of what it put in, before padding.

    op: all_reduce, all_gather, reduce_scatter, all_to_all or broadcast; a collective of a backward
    pass has `.backward` at the end of its name.
    """

    name: str
    op: str
    group: str
    shape: tuple[int, ...]
    dtype: str
    nbytes: int

    @classmethod
    def of(cls, name: str, op: str, group: str, x: Tensor) -> Record:
        dtype = str(x.dtype).removeprefix("torch.")
        return cls(name, op, group, tuple(x.shape), dtype, x.nbytes)


class Log:
    """What the groups of one rank share: the records, or None where nobody listens."""

    records: list[Record] | None = None


def backward(name: str) -> str:
    """What a collective is called in the backward pass of `name`."""
    return name if name.endswith(".backward") else f"{name}.backward"
