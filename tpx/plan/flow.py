"""Types every value of a forward, on every rank, from the resolved shards and the collectives sent.

An abstract interpretation of a family's steps over {replicated, shard(d), partial}. A style splits
logical dimensions, so most of what is refused here no plan can say: it holds a family's layout,
steps and collectives to each other, for every mesh. Faults are PlanError P3xx.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import NoReturn

from ..errors import PlanError
from ..families.flow import Flow, Step
from ..families.layout import Range
from ..families.steps import Collective
from .held import Held, Sent
from .match import at
from .meet import Meeting, meet
from .patterns import generalised
from .types import Rule
from .values import Bias, Token, Value, missing, missing_bias, units_of

HINT = "no plan is at fault: the family's layout, steps and collectives disagree"
Values = list[Value]


def check_flow(held: Held, flow: Flow, sent: Sent) -> tuple[int, int]:
    """-> how many values were typed, and how many ranks' heads compared. Raises PlanError."""
    facts = heads = 0
    for layer in held.layers or {0: 0}:
        typing = Typing(held, sent, layer)
        once = [[c for c in mine if not c.per_layer] for mine in sent.collectives]
        each = [[c for c in mine if c.per_layer] for mine in sent.collectives]
        state = {"tokens": typing.tokens()}
        typing.run(flow.before, state, once)
        begin = state["h"]
        typing.run(flow.layer, state, each)
        if [(v.dims, v.tokens) for v in state["h"]] != [(v.dims, v.tokens) for v in begin]:
            typing.fault("P311", "a layer's result is cut unlike what went into it", ())
        typing.run(flow.after, state, once)
        typing.finish(state["logits"], [*once, *each])
        facts, heads = facts + typing.facts, heads + typing.heads
    return facts, heads


class Typing:
    """The steps of one layer and what lies around it, on all ranks at once."""

    def __init__(self, held: Held, sent: Sent, layer: int):
        self.held, self.sent, self.layer = held, sent, layer
        self.dims, self.mesh = held.layout.dims, held.plan.mesh
        self.places = [self.mesh.coords(rank) for rank in range(self.mesh.world)]
        self.facts = self.heads = 0
        self.whole: dict[int, bool] = {}
        self.meeting = Meeting(self.mesh, self.dims, self.fault)

    def tokens(self) -> Values:
        kept: dict[int, Value] = {}
        return [kept.setdefault(c.dp, Value((), ((c.dp, 0, 1),))) for c in self.places]

    def run(
        self, steps: Sequence[Step], state: dict[str, Values], sent: list[list[Collective]]
    ) -> None:
        """Takes from `sent` the collectives that the steps use."""
        for step in steps:
            inputs = [state[name] for name in step.inputs]
            if step.op == "meet":
                (values,) = inputs
                if sent[0] and sent[0][0].name == step.name:
                    values = meet(self.meeting, step, sent[0][0], values)
                    for mine in sent:
                        mine.pop(0)
                state[step.out] = values
            else:
                self.along(step, inputs)
                made: dict[object, Value] = {}
                state[step.out] = [
                    self.once(made, step, rank, [values[rank] for values in inputs])
                    for rank in range(self.mesh.world)
                ]
            self.facts += self.mesh.world

    def once(self, made: dict[object, Value], step: Step, rank: int, inputs: list[Value]) -> Value:
        """Ranks with the same inputs and the same shards get the same value."""
        shards = [self.held.shards[rank][self.name(p)] for p in step.parameters]
        key: list[object] = [*map(id, inputs), *map(id, shards)]
        if step.op == "select":
            key.append(self.held.cuts[rank][step.along])
        if step.op == "slice" and step.name:
            key.append(self.place(step.name, rank))
        if step.op == "bias":
            key.append(self.adds(step, rank))
        found = made.get(tuple(key))
        if found is None:
            found = made[tuple(key)] = getattr(self, f"_{step.op}")(step, rank, *inputs)
        return found

    def along(self, step: Step, inputs: list[Values]) -> None:
        """All inputs of a step are of the same tokens."""
        for values in inputs[1:]:
            for mine, other in zip(inputs[0], values, strict=True):
                if mine.tokens is not other.tokens and mine.tokens != other.tokens:
                    what = f"`{step.op}` of `{step.inputs[0]}` and what goes with it"
                    self.fault("P312", f"{what} meets values of different tokens", step.parameters)

    # What each kind of step makes of one rank's values.

    def _lookup(self, step: Step, rank: int, tokens: Value) -> Value:
        (units,) = self.units(step, rank, 0).values()
        return Value((), tokens.tokens, (step.along,), ((units,),), (), step.parameters)

    def _linear(self, step: Step, rank: int, x: Value) -> Value:
        self.complete(x, step)
        units = self.units(step, rank, 0)
        for i in range(1, len(step.parameters)):
            if self.units(step, rank, i) != units:
                self.fault("P311", "weights and their scales are cut unlike", step.parameters)
        dims = dict(x.dims)
        if not dims.keys() <= units.keys():
            self.fault("P311", "its input is cut over what it does not have", step.parameters)
        for name, mine in units.items():
            if dims.get(name, mine if name != step.along else None) != mine:
                self.fault("P311", f"an input is cut over {self.key(name)} unlike its weights",
                           step.parameters)  # fmt: skip
            dims[name] = mine
        if not step.along:
            return Value(tuple(dims.items()), x.tokens)
        summed = dims.pop(step.along, None)
        if summed is None:
            self.fault("P311", f"the sum over {self.key(step.along)} has no weights for it",
                       step.parameters)  # fmt: skip
        return Value(
            tuple(dims.items()), x.tokens, (step.along,), ((summed,),), (), step.parameters
        )

    def _bias(self, step: Step, rank: int, x: Value) -> Value:
        biases = list(x.biases)
        for i, parameter in enumerate(step.parameters):
            if self.units(step, rank, i) != dict(x.dims):
                self.fault("P311", "a bias is cut unlike what it is added to", (parameter,))
            if x.over:
                biases.append(Bias(parameter, x.dims, self.adds(step, rank)))
        return x._replace(biases=tuple(biases))

    def adds(self, step: Step, rank: int) -> bool:
        """Whether this rank adds the bias: where it is added once, the first along the axis."""
        name = self.name(step.parameters[0])
        axis = self.held.cuts[rank].get(self.held.layout.parameters[name].sums_over)
        if not self.held.shards[rank][name].add_once or axis is None or axis.axis is None:
            return True
        return bool(getattr(self.places[rank], axis.axis) == 0)

    def _elementwise(self, step: Step, rank: int, *inputs: Value) -> Value:
        for value in inputs:
            self.complete(value, step)
            if value.dims != inputs[0].dims:
                self.fault("P311", "values that meet one by one are cut unlike", step.parameters)
        return Value(inputs[0].dims, inputs[0].tokens)

    _add = _elementwise

    def _whole(self, step: Step, rank: int, x: Value) -> Value:
        self.complete(x, step)
        self.uncut(x, step)
        for i in range(len(step.parameters)):
            if any(u != (0, self.dims[n].size) for n, u in self.units(step, rank, i).items()):
                self.fault("P313", f"`{step.out}` needs whole rows, and its weight is cut",
                           step.parameters)  # fmt: skip
        return Value(x.dims, x.tokens)

    def _attention(self, step: Step, rank: int, q: Value, k: Value, v: Value) -> Value:
        for value in (q, k, v):
            self.complete(value, step)
        heads, groups = q.held("Q"), k.held("KV")
        if heads is None or groups is None or k.dims != v.dims:
            self.fault("P311", "keys and values are cut unlike", step.parameters)
        for i in range(len(step.parameters)):
            if self.units(step, rank, i) != dict(q.dims):
                self.fault("P311", "it is cut unlike the query heads", step.parameters)
        each = self.dims["Q"].size // self.dims["KV"].size
        if (heads[0] // each, -(-heads[1] // each)) != groups:
            self.fault(
                "P314",
                f"rank {rank} holds query heads {heads[0]} to {heads[1]} and key heads {groups[0]} "
                f"to {groups[1]}, and {each} query heads share a key head",
                step.parameters,
            )
        self.heads += 1
        return Value(q.dims, q.tokens)

    def _select(self, step: Step, rank: int, x: Value, *others: Value) -> Value:
        for value in (x, *others):
            self.complete(value, step)
            self.uncut(value, step)
        cut = self.held.cuts[rank][step.along]
        return Value((*x.dims, (step.along, (cut.start, cut.stop))), x.tokens)

    def _weigh(self, step: Step, rank: int, y: Value, weights: Value) -> Value:
        self.complete(weights, step)
        units = y.held(step.along)
        assert units is not None, f"{step=} {y=}"
        boxes = tuple((*box, units) for box in y.boxes) if y.over else ((units,),)
        return y._replace(
            dims=tuple(dim for dim in y.dims if dim[0] != step.along),
            over=(*y.over, step.along),
            boxes=boxes,
            source=y.source or step.parameters,
        )

    def _slice(self, step: Step, rank: int, x: Value) -> Value:
        if not step.name:
            return x
        self.complete(x, step)
        ((dp, i, n),) = x.tokens
        place, parts = self.place(step.name, rank), self.mesh.size(step.name)
        mine: Token = (dp, i * parts + place, n * parts)
        return Value(x.dims, (mine,))

    # What steps need of their inputs.

    def place(self, group: str, rank: int) -> int:
        return self.meeting.place(group, rank)

    def complete(self, value: Value, step: Step) -> None:
        """Raises where a sum is not whole, or has a bias never or twice."""
        if value.over:
            phrase = missing(value, self.dims)
            if phrase:
                over = " and ".join(self.key(name) for name in value.over)
                text = f"a sum over {over} {phrase} before `{step.op}` takes it as `{step.out}`"
                self.fault("P309", text, value.source)
            wrong = missing_bias(value, self.dims)
            if wrong:
                self.fault("P310", f"the bias {wrong[1]} before `{step.op}`", (wrong[0],))

    def uncut(self, value: Value, step: Step) -> None:
        for name, units in value.dims:
            if units != (0, self.dims[name].size):
                text = f"`{step.out}` needs whole rows, and they are cut over {self.key(name)}"
                self.fault("P313", text, step.parameters)

    def finish(self, logits: Values, left: Iterable[list[Collective]]) -> None:
        end = Step("whole", "logits", ("logits",))
        for rank, value in enumerate(logits):
            self.complete(value, end)
            self.uncut(value, end)
            if value.tokens != ((self.places[rank].dp, 0, 1),):
                self.fault("P312", f"rank {rank} ends with the logits of other tokens", ())
        for mine in left:
            if mine:
                name = f"collective `{mine[0].name}` over {mine[0].group}"
                self.fault("P316", f"{name} is sent, and no step takes it there", ())

    def units(self, step: Step, rank: int, i: int) -> dict[str, Range]:
        """The logical units of a parameter that a rank holds."""
        name = self.name(step.parameters[i])
        shard, parameter = self.held.shards[rank][name], self.held.layout.parameters[name]
        found = {}
        for dim, ranges in zip(parameter.dims, shard.ranges, strict=True):
            units = units_of(dim, ranges)
            if units is None:
                self.fault("P205", f"ranges `{list(ranges)}` of a dimension of {dim.size} are not "
                           f"one range of {self.key(dim.logical)}", (name,))  # fmt: skip
            if dim.logical:
                found[dim.logical] = units
        return found

    def name(self, parameter: str) -> str:
        return parameter.replace("*", str(self.layer))

    def key(self, logical: str) -> str:
        return self.dims[logical].config_key if logical else "any logical dimension"

    def fault(self, code: str, text: str, parameters: Iterable[str]) -> NoReturn:
        names = [self.name(name) for name in parameters]
        lines = [self.held.shards[0][name].line for name in names]
        where = at(self.held.plan, *(Rule("", "", line) for line in lines))
        what = f"`{generalised(names[0])}`: " if names else ""
        dispatch = f" (dispatch {self.sent.name})" if code in ("P309", "P310", "P312") else ""
        raise PlanError(f"{where}: {what}{text}{dispatch}", HINT, code=code)
