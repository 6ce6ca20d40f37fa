"""The steps of one forward pass as data: what plan/flow.py types and the model's module computes.

Knows which parameters a step reads, which logical dimension it sums over and which collective
follows; knows no plan, no rank and no tensor.
"""

from __future__ import annotations

from typing import Literal, NamedTuple

from .steps import DispatchName

Op = Literal[
    "lookup",
    "linear",
    "bias",
    "elementwise",
    "whole",
    "attention",
    "select",
    "weigh",
    "slice",
    "add",
    "meet",
]


class Step(NamedTuple):
    """`out` becomes what `op` makes of `inputs` and `parameters` (layer numbers as `*`).

    lookup    rows of a table by token id; sums over `along`, which the table's rows are
    linear    a product with weights (blocks and scales are two parameters); sums over `along`, or
              over what no plan cuts; any other logical dimension of the weights is kept or new
    bias      adds parameters; on a partial sum exactly one rank may
    elementwise  not linear, value by value: inputs of one shape, of which any may be cut
    whole     not linear, over whole rows: norm, softmax, top-k
    attention inputs q, k, v, each head by itself; parameters are one value a query head
    select    the rows of the experts that this rank holds, `along` their dimension; the further
              inputs say which rows those are
    weigh     the sum over experts, `along`, of the first input times the second
    slice     this rank's share of the tokens among the ranks of group `name`; "": all of them
    add       two values of one shape
    meet      collective `name`, if it is in the list of those that are sent. `along`: what an
              all-gather joins, a logical dimension or "tokens"; "send" or "return" for all-to-all
    """

    op: Op
    out: str
    inputs: tuple[str, ...] = ()
    parameters: tuple[str, ...] = ()
    along: str = ""
    name: str = ""


class Flow(NamedTuple):
    """before and after run once, layer in each layer. `tokens` is the first value, `h` goes from
    layer to layer, and `logits` is the last, whole on every rank of a tp group."""

    before: tuple[Step, ...]
    layer: tuple[Step, ...]
    after: tuple[Step, ...]


def moe_steps(dispatch: DispatchName, experts: tuple[Step, ...]) -> tuple[Step, ...]:
    """One Mixture-of-Experts layer: from `x`, `ids` and `weights` of the tokens here to `sum`.

    experts: the steps from `rows` to `y`.
    """
    inner = (
        Step("select", "rows", ("x", "ids"), along="E"),
        *experts,
        Step("weigh", "sum", ("y", "weights"), along="E"),
    )
    match dispatch:
        case "local":
            return inner
        case "replicated":
            return (*inner, _meet("sum", "moe.combine"))
        case "gather":
            return (
                _meet("x", "moe.gather_tokens", "tokens"),
                _meet("ids", "moe.gather_ids", "tokens"),
                _meet("weights", "moe.gather_weights", "tokens"),
                *inner,
                _meet("sum", "moe.scatter"),
                _meet("sum", "moe.reduce"),
            )
        case "all_to_all":
            return _all_to_all(experts)


def _all_to_all(experts: tuple[Step, ...]) -> tuple[Step, ...]:
    """Rows arrive only where their number was sent first: `counts` has to travel with them."""
    return (
        *(Step("slice", name, (name,), name="slice") for name in ("x", "ids", "weights")),
        Step("slice", "counts", ("ids",)),
        _meet("counts", "moe.counts", "send"),
        _meet("x", "moe.tokens", "send"),
        _meet("ids", "moe.ids", "send"),
        _meet("weights", "moe.weights", "send"),
        Step("select", "rows", ("x", "ids", "counts"), along="E"),
        *experts,
        Step("weigh", "sum", ("y", "weights"), along="E"),
        _meet("sum", "moe.etp"),
        _meet("sum", "moe.return", "return"),
        _meet("sum", "moe.slices", "tokens"),
    )


def _meet(value: str, name: str, along: str = "") -> Step:
    return Step("meet", value, (value,), along=along, name=name)
