"""What each collective makes of the values of its group: the half of flow typing between ranks."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from itertools import chain
from typing import NoReturn

from ..families.flow import Step
from ..families.steps import Collective
from ..mesh import Mesh
from .values import Sizes, Value, adds_nothing, joined, missing, missing_bias

Fault = Callable[[str, str, Iterable[str]], NoReturn]


class Meeting:
    """The groups of a mesh, and how to refuse."""

    def __init__(self, mesh: Mesh, dims: Sizes, fault: Fault):
        self.mesh, self.dims, self.fault = mesh, dims, fault
        self._groups: dict[str, list[tuple[int, ...]]] = {}
        self._places: dict[str, dict[int, int]] = {}

    def groups(self, name: str) -> list[tuple[int, ...]]:
        if name not in self._groups:
            self._groups[name] = self.mesh.groups(name)
        return self._groups[name]

    def place(self, name: str, rank: int) -> int:
        """A rank's place in its group."""
        if name not in self._places:
            groups = self.groups(name)
            self._places[name] = {r: i for group in groups for i, r in enumerate(group)}
        return self._places[name][rank]


def meet(meeting: Meeting, step: Step, collective: Collective, values: list[Value]) -> list[Value]:
    """The values of all ranks after the collective, which is the one that `step` names."""
    out = list(values)
    for group in meeting.groups(collective.group):
        there = [values[rank] for rank in group]
        first = adding(there)[0]
        for value in there:
            over = value.over == first.over or adds_nothing(value)
            if not over or (value.dims != first.dims and collective.op != "all_gather"):
                text = f"`{collective.name}` adds or moves values that are cut unlike"
                meeting.fault("P311", text, value.source)
        found = _group(meeting, step, collective, there)
        for rank, value in zip(group, found, strict=True):
            out[rank] = value
    return out


def adding(there: list[Value]) -> list[Value]:
    """Those that are more than zeros, which may be whole where the zeros are parts."""
    return [value for value in there if not adds_nothing(value)] or there


def _group(meeting: Meeting, step: Step, of: Collective, there: list[Value]) -> list[Value]:
    match of.op, step.along:
        case "all_reduce", _:
            _same_tokens(meeting, of, there)
            return [_sum(meeting, of, there)] * len(there)
        case "reduce_scatter", _:
            _same_tokens(meeting, of, there)
            total = _sum(meeting, of, there)
            if len(total.tokens) != len(there):
                meeting.fault("P312", f"`{of.name}` deals out other tokens than its ranks have", ())
            return [total._replace(tokens=(token,)) for token in total.tokens]
        case ("all_gather", "tokens") | ("all_to_all", "send"):
            _whole(meeting, of, there)
            tokens = tuple(chain.from_iterable(value.tokens for value in there))
            if of.op == "all_gather":
                tokens = joined(tokens)
            return [there[0]._replace(tokens=tokens)] * len(there)
        case "all_to_all", "return":
            return _returned(meeting, of, there)
        case "all_gather", _:
            _whole(meeting, of, there)
            return [_joined_dim(meeting, of, step.along, there)] * len(there)
    raise AssertionError(f"{of=} {step=}")


def _sum(meeting: Meeting, of: Collective, there: list[Value]) -> Value:
    """Their sum, which is no partial one any more if it is whole."""
    first, *others = adding(there)
    if not first.over:
        if others or len(there) == 1:
            text = (
                f"`{of.name}` adds a value over {of.group} that is whole on each of "
                f"{1 + len(others)} ranks"
            )
            meeting.fault("P309", text, first.source)
        return first
    found = first._replace(
        boxes=tuple(chain.from_iterable(value.boxes for value in there)),
        biases=tuple(chain.from_iterable(value.biases for value in there)),
    )
    phrase = missing(found, meeting.dims)
    if phrase and phrase.endswith("times"):
        over = " and ".join(meeting.dims[name].config_key for name in first.over)
        meeting.fault("P309", f"a sum over {over} {phrase} by `{of.name}`", first.source)
    if phrase:
        return found
    wrong = missing_bias(found, meeting.dims)
    if wrong:
        meeting.fault("P310", f"the bias {wrong[1]} by `{of.name}`", (wrong[0],))
    return Value(found.dims, found.tokens)


def _same_tokens(meeting: Meeting, of: Collective, there: list[Value]) -> None:
    for value in there[1:]:
        if value.tokens is not there[0].tokens and value.tokens != there[0].tokens:
            meeting.fault("P312", f"`{of.name}` adds sums of different tokens", value.source)


def _whole(meeting: Meeting, of: Collective, there: list[Value]) -> None:
    for value in there:
        phrase = missing(value, meeting.dims)
        if phrase:
            meeting.fault("P309", f"a sum {phrase} before `{of.name}` moves it", value.source)


def _returned(meeting: Meeting, of: Collective, there: list[Value]) -> list[Value]:
    """Each rank sends back what it added for each of the group, who adds what comes."""
    if any(len(value.tokens) != len(there) for value in there):
        meeting.fault("P312", f"`{of.name}` returns other tokens than were sent", there[0].source)
    _same_tokens(meeting, of, there)
    total = _sum(meeting, of, there)
    return [total._replace(tokens=(token,)) for token in total.tokens]


def _joined_dim(meeting: Meeting, of: Collective, dim: str, there: list[Value]) -> Value:
    at, size = 0, meeting.dims[dim].size
    _same_tokens(meeting, of, there)
    for value in there:
        units = value.held(dim)
        if units is None or units[0] != at:
            text = f"`{of.name}` joins pieces that do not follow each other"
            meeting.fault("P311", text, value.source)
        at = units[1]
    if at != size:
        meeting.fault("P311", f"`{of.name}` joins {at} of {size} rows", there[0].source)
    dims = tuple((name, (0, size) if name == dim else units) for name, units in there[0].dims)
    return there[0]._replace(dims=dims)
