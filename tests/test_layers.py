"""Layers cut over real ranks give what one rank gives: outputs, gradients, collectives."""

from __future__ import annotations

from functools import partial
from typing import Any, NamedTuple

import pytest
import torch
from paged import Pages
from ranks import ranks

from tpx.batch import FULL, SLIDING
from tpx.comm import Groups
from tpx.families.spec import Rope
from tpx.layers.attention import Attention
from tpx.layers.embedding import VocabEmbedding, VocabHead
from tpx.layers.linear import Colwise, Rowwise
from tpx.layers.norm import RMSNorm
from tpx.mesh import Mesh
from tpx.ops.rms_norm import rms_norm
from tpx.ops.rope import rope_frequencies, rope_tables
from tpx.split import split

HIDDEN, WINDOW = 24, 4
FLOAT = torch.float64  # so that sums in another order agree to the last digits
ALONE = Groups.alone(torch.device("cpu"))


class Seen(NamedTuple):
    """What a layer gave: outputs, its input's gradient, and (name, op, shape) of collectives."""

    out: torch.Tensor
    grad: torch.Tensor
    sent: list[tuple[str, str, tuple[int, ...]]]


def random(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=FLOAT)


def observe(run: Any, x: torch.Tensor, groups: Groups) -> Seen:
    """Backward of a sum with fixed weights, which every rank computes alike."""
    x = x.clone().requires_grad_()
    with groups.recording() as records:
        out = run(x)
        (out.double() * random(*out.shape, seed=9)).sum().backward()
    return Seen(out.detach(), x.grad, [(r.name, r.op, r.shape) for r in records])


def groups_of(world: int) -> Groups:
    """Of the calling rank, in a tp group of all ranks."""
    if world == 1:
        return ALONE
    rank = torch.distributed.get_rank()
    return Groups(Mesh(tp=world, ep=world), rank, torch.device("cpu"))


def assert_alike(world, fn, *args):
    """fn(world, *args) on `world` ranks gives what it gives on one; -> the first rank's records."""
    expected = fn(1, *args)
    assert expected.sent == []
    seen = ranks(world).run(fn, world, *args)
    for got in seen:
        torch.testing.assert_close(got.out, expected.out)
        torch.testing.assert_close(got.grad, expected.grad)
    return seen[0].sent


def two_linears(world: int, width: int, tokens: int) -> Seen:
    """Colwise then Rowwise over `width` units in between."""
    groups = groups_of(world)
    group = groups["tp"]
    start, stop = split(width, world)[group.rank]
    first = Colwise(HIDDEN, stop - start, group, FLOAT)
    second = Rowwise(stop - start, HIDDEN, group, "second", FLOAT)
    first.load_state_dict(
        {"weight": random(width, HIDDEN)[start:stop], "bias": random(width)[start:stop]}
    )
    second.load_state_dict({"weight": random(HIDDEN, width)[:, start:stop], "bias": random(HIDDEN)})
    residual = random(tokens, HIDDEN, seed=2)
    x = random(tokens, HIDDEN, seed=1)
    return observe(lambda x: second(first(x).tanh(), residual), x, groups)


@pytest.mark.parametrize("tokens", [0, 1, 5])
def test_colwise_then_rowwise_is_one_sum_and_one_bias(tokens):
    sent = assert_alike(2, two_linears, 7, tokens)
    shape = (tokens, HIDDEN)
    assert sent == [("second", "all_reduce", shape), ("copy.backward", "all_reduce", shape)]


def embedding(world: int, vocabulary: int, ids: list[int]) -> Seen:
    groups = groups_of(world)
    start, stop = split(vocabulary, world)[groups["tp"].rank]
    layer = VocabEmbedding(start, stop, HIDDEN, groups["tp"], FLOAT)
    layer.load_state_dict({"weight": random(vocabulary, HIDDEN)[start:stop]})
    return observe(
        lambda x: layer(torch.tensor(ids, dtype=torch.int64)) + x, random(1, HIDDEN), groups
    )


@pytest.mark.parametrize("world", [2, 4])
@pytest.mark.parametrize("ids", [[], [0], [130, 0, 65, 66, 33, 32, 98, 99, 130]])
def test_a_token_finds_its_row_on_whichever_rank_holds_it(world, ids):
    sent = assert_alike(world, embedding, 131, ids)
    assert sent == [("embed", "all_reduce", (len(ids), HIDDEN))]
    assert torch.equal(embedding(1, 131, ids).out, random(131, HIDDEN)[ids] + random(1, HIDDEN))


def test_a_rank_without_rows_of_the_vocabulary_is_refused():
    with pytest.raises(AssertionError, match="a rank without rows"):
        VocabEmbedding(3, 3, HIDDEN, ALONE.none, FLOAT)


def head(world: int, vocabulary: int, rows: int) -> Seen:
    groups = groups_of(world)
    group = groups["tp"]
    start, stop = split(vocabulary, world)[group.rank]
    layer = VocabHead(vocabulary, HIDDEN, group, FLOAT)
    layer.load_state_dict({"weight": random(vocabulary, HIDDEN)[start:stop]})
    seen = observe(layer, random(rows, HIDDEN, seed=1), groups)
    assert seen.out.dtype == torch.float32
    assert seen.out.is_contiguous()
    return seen


@pytest.mark.parametrize(("world", "vocabulary"), [(2, 131), (4, 131), (4, 257), (2, 8)])
@pytest.mark.parametrize("rows", [0, 1, 3])
def test_logits_of_uneven_parts_of_the_vocabulary_are_joined(world, vocabulary, rows):
    sent = assert_alike(world, head, vocabulary, rows)
    local = -(-vocabulary // world)
    assert sent == [
        ("head", "all_gather", (local, rows)),
        ("copy.backward", "all_reduce", (rows, HIDDEN)),
    ]
    whole = random(rows, HIDDEN, seed=1) @ random(vocabulary, HIDDEN).t()
    torch.testing.assert_close(head(1, vocabulary, rows).out, whole.float())


class Heads(NamedTuple):
    query: int
    key: int
    width: int
    window: int | None


def attention_weights(heads: Heads) -> dict[str, torch.Tensor]:
    """Whole, as a checkpoint holds them."""
    q, kv = heads.query * heads.width, heads.key * heads.width
    shapes = {"q_proj": (q, HIDDEN), "k_proj": (kv, HIDDEN), "v_proj": (kv, HIDDEN)}
    shapes["o_proj"] = (HIDDEN, q)
    found = {"sinks": random(heads.query)}
    for seed, (name, shape) in enumerate(shapes.items()):
        found[f"{name}.weight"] = random(*shape, seed=seed) / shape[1] ** 0.5
        found[f"{name}.bias"] = random(shape[0], seed=seed + 10)
    return found


def own_part(name: str, whole: torch.Tensor, q: slice, kv: slice, width: int) -> torch.Tensor:
    if name == "sinks":
        return whole[q]
    if name == "o_proj.bias":
        return whole
    heads = kv if name.startswith(("k_proj", "v_proj")) else q
    rows = slice(heads.start * width, heads.stop * width)
    return whole[:, rows] if name == "o_proj.weight" else whole[rows]


def attention_layer(world: int, heads: Heads, groups: Groups) -> Attention:
    """The calling rank's heads; key heads are shared by neighbours where there are too few."""
    rank = groups["tp"].rank
    q = slice(*split(heads.query, world)[rank])
    first = rank * heads.key // world
    kv = slice(first, first + max(1, heads.key // world))
    sizes = (q.stop - q.start, kv.stop - kv.start, heads.width, heads.window)
    layer = Attention(HIDDEN, *sizes, groups["tp"], FLOAT)
    whole = attention_weights(heads)
    layer.load_state_dict({n: own_part(n, x, q, kv, heads.width) for n, x in whole.items()})
    return layer


def attend(world: int, heads: Heads, steps: list[list[int]]) -> Seen:
    """Several steps of sequences that grow; observes the last one."""
    groups = groups_of(world)
    layer = attention_layer(world, heads, groups)
    kind = FULL if heads.window is None else SLIDING
    pages = Pages([kind], layer.kv_shape[0], heads.width, WINDOW, page=2, dtype=FLOAT)
    frequencies = rope_frequencies(Rope(1e4, 4.0, 16), heads.width)
    for number, counts in enumerate(steps):
        batch = pages.step([[0] * n for n in counts])
        cos, sin = rope_tables(batch.positions_T, frequencies, 1.1, FLOAT)
        zeros = torch.zeros(sum(counts), HIDDEN, dtype=FLOAT)
        given = {"residual_TD": zeros, "batch": batch, "cache": pages.caches[0]}
        run = partial(layer, **given, cos=cos, sin=sin)
        seen = observe(run, random(sum(counts), HIDDEN, seed=number), groups)
        pages.caches = [type(c)(*(x.detach() for x in c)) for c in pages.caches]
    return seen


@pytest.mark.parametrize("window", [None, WINDOW])
@pytest.mark.parametrize(("world", "query", "key"), [(2, 4, 2), (2, 4, 1), (4, 8, 2), (4, 4, 4)])
def test_attention_with_its_heads_cut_is_attention(world, query, key, window):
    heads = Heads(query, key, 8, window)
    sent = assert_alike(world, attend, heads, [[1, 6], [3, 1], [1, 1]])
    shape = (2, HIDDEN)
    assert sent[0] == ("attention", "all_reduce", shape)
    assert sent[1:] == [("copy.backward", "all_reduce", shape)] * 3  # of q, k and v


def test_attention_takes_part_without_a_token():
    sent = assert_alike(2, attend, Heads(4, 2, 8, WINDOW), [[]])
    assert sent[0] == ("attention", "all_reduce", (0, HIDDEN))


def test_attention_of_heads_that_are_not_cut_sends_nothing():
    seen = attend(1, Heads(4, 2, 8, None), [[3]])
    assert seen.sent == []


def test_rms_norm_holds_its_weight_and_epsilon():
    layer = RMSNorm(HIDDEN, 1e-3, FLOAT)
    layer.load_state_dict({"weight": random(HIDDEN)})
    x = random(3, HIDDEN, seed=1)
    assert torch.equal(layer(x), rms_norm(x, random(HIDDEN), 1e-3))
