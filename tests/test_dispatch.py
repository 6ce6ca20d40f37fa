"""Every dispatch against a dense oracle, at every mesh of up to 4 ranks that permits it."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
from moe_cases import CASES, DISPATCHES, answer, answers, oracle, owners, problem
from ranks import ranks
from torch import Tensor, distributed

from tpx.comm import Groups
from tpx.errors import PlanError
from tpx.mesh import Mesh
from tpx.moe.dispatch import place
from tpx.split import split


def permits(mesh: Mesh, dispatch: str) -> bool:
    return {
        "local": mesh.expert_size == 1,
        "replicated": mesh.tp % mesh.expert_size == 0,
        "gather": mesh.expert_size % mesh.tp == 0,
        "all_to_all": True,
    }[dispatch]


def meshes() -> Iterator[Mesh]:
    sizes = (1, 2, 4)
    shapes = [
        (a, b, c, d, e) for a in sizes for b in sizes for c in sizes for d in sizes for e in sizes
    ]
    for shape in shapes:
        try:
            mesh = Mesh(*shape)
        except PlanError:
            continue
        if mesh.world <= 4:
            yield mesh


PAIRS = [(mesh, name) for mesh in meshes() for name in DISPATCHES if permits(mesh, name)]


def close(mine: Tensor, theirs: Tensor) -> None:
    """To 1e-5 of the largest value."""
    assert mine.shape == theirs.shape
    if theirs.numel():
        scale = theirs.abs().max().item()
        torch.testing.assert_close(mine, theirs, rtol=0, atol=1e-5 * scale)


@pytest.mark.parametrize(("mesh", "name"), PAIRS, ids=[f"{n}: {m}" for m, n in PAIRS])
def test_outputs_and_gradients_equal_the_dense_oracle(mesh: Mesh, name: str):
    by_rank = ranks(mesh.world).run(answers, mesh, name, CASES)
    for i, case in enumerate(CASES):
        out_TD, h_grad, weights_grad = oracle(problem(case, mesh.dp), case.top_k)
        starts = [sum(case.tokens[:dp]) for dp in range(mesh.dp + 1)]
        for rank, found in enumerate(by_rank):
            dp = mesh.coords(rank).dp
            mine = slice(starts[dp], starts[dp + 1])
            close(found[i].out_TD, out_TD[mine])
            close(found[i].h_grad, h_grad[mine])
            close(found[i].weights_grad, weights_grad[mine])
            # The same bits on every rank of a tp group.
            assert torch.equal(found[i].out_TD, by_rank[dp * mesh.tp][i].out_TD)
        # Each pair (token, expert) is computed once, by all of an etp group; but as often as there
        # are expert groups in a tp group where those do not share the tokens out. Padding never is.
        times = mesh.etp
        if name in ("local", "replicated"):
            times *= mesh.tp // mesh.expert_size
        pairs = sum(case.tokens[: mesh.dp]) * case.top_k
        assert sum(found[i].computed for found in by_rank) == pairs * times


def test_the_meshes_are_all_there_are():
    """So that no test here passes for want of meshes."""
    by_world = {world: [m for m in meshes() if m.world == world] for world in (1, 2, 4)}
    assert {world: len(found) for world, found in by_world.items()} == {1: 1, 2: 5, 4: 14}
    assert {name for _, name in PAIRS} == set(DISPATCHES)


@pytest.mark.parametrize(
    "mesh",
    [
        Mesh(dp=2, ep=2),
        Mesh(dp=4, ep=4),
        Mesh(dp=2, tp=2, ep=4),
        Mesh(dp=2, tp=2, ep=2, etp=2),
        Mesh(dp=2, tp=2, edp=2, ep=2),
        Mesh(tp=4, ep=4),
    ],
    ids=str,
)
def test_all_to_all_sends_one_row_for_each_token_and_destination_rank(mesh: Mesh):
    """Counts the rows that a rank puts into each exchange, those for itself included."""
    by_rank = ranks(mesh.world).run(answers, mesh, "all_to_all", CASES)
    repeated = 0
    for i, case in enumerate(CASES):
        ids_TK = problem(case, mesh.dp).routing.expert_ids_TK
        owner_E, _ = owners(case, mesh.ep)
        sent, came_back = [], []
        for rank, found in enumerate(by_rank):
            rows = {record.name: record.shape[0] for record in found[i].records}
            c = mesh.coords(rank)
            start = sum(case.tokens[: c.dp])
            low, high = split(case.tokens[c.dp], mesh.tp // mesh.etp)[c.tp // mesh.etp]
            ids = ids_TK[start + low : start + high].tolist()
            pairs = {(t, owner_E[e]) for t, chosen in enumerate(ids) for e in chosen}
            assert rows["moe.tokens"] == rows["moe.ids"] == rows["moe.weights"] == len(pairs)
            repeated += sum(len(chosen) for chosen in ids) - len(pairs)
            sent.append(rows["moe.tokens"])
            came_back.append(rows["moe.return"])
        assert sum(sent) == sum(came_back)
    assert repeated > 0, "no token had two experts on one rank, so sharing was not tried"


def names(mesh: Mesh, name: str) -> list[tuple[str, str, str]]:
    by_rank = ranks(mesh.world).run(answers, mesh, name, CASES[:1])
    calls = [[(r.name, r.op, r.group) for r in found[0].records] for found in by_rank]
    assert all(call == calls[0] for call in calls)
    return calls[0]


def test_collectives_of_each_dispatch():
    assert names(Mesh(tp=2, edp=2), "local") == []
    assert names(Mesh(tp=2, ep=2), "replicated") == [("moe.combine", "all_reduce", "expert")]
    gathers = [
        ("moe.gather_tokens", "all_gather", "gather"),
        ("moe.gather_ids", "all_gather", "gather"),
        ("moe.gather_weights", "all_gather", "gather"),
        ("moe.scatter", "reduce_scatter", "gather"),
    ]
    assert names(Mesh(dp=2, ep=2), "gather") == gathers
    reduce = ("moe.reduce", "all_reduce", "tp")
    assert names(Mesh(dp=2, tp=2, ep=4), "gather") == [*gathers, reduce]
    exchanges = [
        ("moe.counts", "all_to_all", "ep"),
        ("moe.tokens", "all_to_all", "ep"),
        ("moe.ids", "all_to_all", "ep"),
        ("moe.weights", "all_to_all", "ep"),
        ("moe.return", "all_to_all", "ep"),
    ]
    assert names(Mesh(dp=2, ep=2), "all_to_all") == exchanges
    slices = ("moe.slices", "all_gather", "slice")
    assert names(Mesh(dp=2, tp=2, ep=4), "all_to_all") == [*exchanges, slices]
    etp = ("moe.etp", "all_reduce", "etp")
    assert names(Mesh(dp=2, tp=2, ep=2, etp=2), "all_to_all") == [
        *exchanges[:4],
        etp,
        exchanges[4],
    ]


def poisoned(mesh: Mesh, name: str) -> Tensor:
    """out_TD where the first token of every dp group is NaN."""
    case, groups = CASES[0], Groups(mesh, distributed.get_rank(), torch.device("cpu"))
    p = problem(case, mesh.dp)
    for dp in range(mesh.dp):
        p.h_TD[sum(case.tokens[:dp])] = torch.nan
    found = answer(case, mesh, name, groups, p)
    groups.close()
    return found.out_TD


def test_a_token_that_is_nan_spoils_no_other():
    for mesh, name in [
        (Mesh(tp=2, ep=2), "replicated"),
        (Mesh(dp=2, ep=2), "gather"),
        (Mesh(dp=2, ep=2), "all_to_all"),
    ]:
        for out_TD in ranks(2).run(poisoned, mesh, name):
            assert out_TD[0].isnan().all()
            assert out_TD[1:].isfinite().all()


def refused(mesh: Mesh, name: str) -> bool:
    groups = Groups(mesh, distributed.get_rank(), torch.device("cpu"))
    try:
        DISPATCHES[name](place(*owners(CASES[0], mesh.ep), groups), groups)
    except AssertionError:
        return True
    finally:
        groups.close()
    return False


@pytest.mark.parametrize(
    ("mesh", "name"),
    [
        (Mesh(tp=2, ep=2), "local"),
        (Mesh(dp=2, ep=2), "replicated"),
        (Mesh(tp=2, edp=2), "gather"),
    ],
    ids=str,
)
def test_a_dispatch_refuses_a_mesh_that_it_cannot_serve(mesh: Mesh, name: str):
    assert ranks(2).run(refused, mesh, name) == [True, True]
