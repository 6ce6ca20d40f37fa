"""What a family says about its checkpoint: how tensors are made of logical dimensions.

Styles split logical dimensions, never tensors, so that blocks, scales, biases, gate and up, query
heads and sinks cannot disagree. Knows no plan, no rank and no file.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, NamedTuple

Range = tuple[int, int]


@dataclass(frozen=True, slots=True)
class Dim:
    """One dimension of a parameter: [outer, units/per, inner] in memory order, flattened.

    `logical` names the dimension that a plan may split, "" for one that never is. Examples:
    `Q*D` is Dim("Q", 64, inner=64); interleaved gate and up, `I*2`, Dim("I", 2880, inner=2);
    concatenated, `2*I`, Dim("I", 2880, outer=2); MXFP4 blocks, `I/32`, Dim("I", 2880, per=32).
    `key` is what config.json calls the size, for messages.
    """

    logical: str
    units: int
    inner: int = 1
    outer: int = 1
    per: int = 1
    key: str = ""

    def __post_init__(self) -> None:
        assert self.units % self.per == 0, f"{self}"

    @property
    def size(self) -> int:
        return self.outer * (self.units // self.per) * self.inner

    def ranges(self, start: int, stop: int) -> tuple[Range, ...]:
        """Where the logical units [start, stop) lie in this dimension, one range a copy."""
        assert start % self.per == stop % self.per == 0, f"{self} {start=} {stop=}"
        period = self.units // self.per * self.inner
        low, high = start // self.per * self.inner, stop // self.per * self.inner
        if (low, high) == (0, period):
            return ((0, self.size),)
        return tuple((i * period + low, i * period + high) for i in range(self.outer))


class Source(NamedTuple):
    """A piece of a checkpoint tensor that fills a piece of a parameter.

    The tensor's elements from `begin`, `shape` of them, lie in the parameter from `at`, which has
    an entry for each of the parameter's dimensions. A tensor of fewer dimensions than the parameter
    is aligned with its last ones and fills one place of the others (a stack of per-expert tensors).
    """

    tensor: str
    begin: tuple[int, ...]
    shape: tuple[int, ...]
    at: tuple[int, ...]


@dataclass(frozen=True, slots=True)
class Parameter:
    """A parameter of the model as the plan sees it.

    dtypes: what the checkpoint may store, in safetensors' names. sums_over: for a bias, the logical
    dimension that the weights beside it contract: where that is split, ranks hold partial sums and
    the bias must be added once only. tied_to: the parameter whose storage this one shares.
    """

    name: str
    dims: tuple[Dim, ...]
    dtypes: tuple[str, ...]
    sources: tuple[Source, ...]
    sums_over: str = ""
    tied_to: str | None = None

    @property
    def shape(self) -> tuple[int, ...]:
        return tuple(dim.size for dim in self.dims)


class Logical(NamedTuple):
    """A dimension that a plan may split, over one mesh axis.

    unit: a split falls on multiples of it. table: the rows of a vocabulary table (style `vocab`).
    replicable: with fewer units than ranks, neighbours share one (KV heads). uneven: whether ranks
    may hold different numbers of units; "ask": if the rule says `uneven: true`.
    """

    name: str
    config_key: str
    size: int
    axis: Literal["tp", "ep", "etp"]
    unit: int = 1
    table: bool = False
    replicable: bool = False
    uneven: Literal["yes", "no", "ask"] = "no"

    @property
    def units(self) -> int:
        return self.size // self.unit


class Contradiction(NamedTuple):
    """Checkpoint tensors (a plan pattern) that cannot be there if config.json is right, and why."""

    pattern: str
    message: str
    hint: str


@dataclass(frozen=True, slots=True)
class Layout:
    """All parameters of a model, its logical dimensions, and what the checkpoint holds beside them.

    together: sets of logical dimensions that are split alike or not at all (query and KV heads).
    ignored: names (plan patterns) of checkpoint tensors that the family does not use.
    Names that others rely on, in every family: "KV" key and value heads, "Q" query heads, "E"
    experts, "I" an expert's intermediate size.
    """

    dims: dict[str, Logical]
    parameters: dict[str, Parameter]
    together: tuple[tuple[str, ...], ...] = ()
    ignored: tuple[str, ...] = ()
    contradictions: tuple[Contradiction, ...] = ()


def whole(name: str, *dims: Dim, dtypes: tuple[str, ...], sums_over: str = "") -> Parameter:
    """A parameter that one checkpoint tensor of the same name and shape fills."""
    shape = tuple(dim.size for dim in dims)
    zeros = (0,) * len(shape)
    return Parameter(name, dims, dtypes, (Source(name, zeros, shape, zeros),), sums_over)
