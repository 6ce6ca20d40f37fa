"""sample under triton's interpreter against the float64 reference."""

from __future__ import annotations

import pytest
import torch
from tpx_attention import reference
from tpx_attention.sample import launch_sample

pytestmark = pytest.mark.skipif(torch.cuda.is_available(), reason="the interpreter's tests")
MORE, SOAK = pytest.mark.more, pytest.mark.soak


def columns(rows):
    """temperature, top-k, top-p, u a row."""
    t, k, p, u = zip(*rows, strict=False)
    double = torch.float64
    return (
        torch.tensor(t, dtype=double),
        torch.tensor(k, dtype=torch.int64),
        torch.tensor(p, dtype=double),
        torch.tensor(u, dtype=double),
    )


def draws(logits, rows, chunk=64, any_top_k=True, any_top_p=True):
    wanted = columns(rows)
    got = launch_sample(logits, *wanted, any_top_k, any_top_p, chunk)
    assert got.tolist() == reference.sample(logits, *wanted).tolist()
    return got.tolist()


ROWS = [
    (0.0, 0, 1.0, 0.3),
    (1.0, 0, 1.0, 0.9999999),
    (0.7, 5, 1.0, 0.61),
    (1.3, 0, 0.8, 0.0),
    (1.0, 40, 0.5, 0.99),
    (2.0, 1, 1.0, 0.5),
    (1.0, 1000, 0.999, 0.7),
    (1e-6, 3, 0.9, 0.2),
    (1.0, 0, 1e-9, 0.5),
]


BRIEF = [ROWS[i] for i in (0, 4, 6)]


def test_kinds_of_request_with_ties():
    make = torch.Generator().manual_seed(4)
    logits = torch.randint(-9, 9, (len(BRIEF), 70), generator=make) / 4.0
    logits[:, ::7] *= -1.0  # both zeros
    draws(logits, BRIEF)


def test_without_filters_and_with_infinite_logits():
    make = torch.Generator().manual_seed(9)
    logits = torch.randn(3, 130, generator=make)
    logits[:, 40:90] = -torch.inf
    rows = [(0.0, 0, 1.0, 0.1), (1.0, 0, 1.0, 0.5), (3.0, 0, 1.0, 0.999)]
    draws(logits, rows, any_top_k=False, any_top_p=False)


@pytest.mark.more
def test_one_filter_alone():
    make = torch.Generator().manual_seed(1)
    logits = torch.randn(3, 100, generator=make)
    top_k = [(1.0, 5, 1.0, 0.4), (1.0, 0, 1.0, 0.7), (0.5, 99, 1.0, 0.2)]
    draws(logits, top_k, any_top_p=False)
    draws(logits, [(t, 0, 0.6, u) for t, _, _, u in top_k], any_top_k=False)


@pytest.mark.more
def test_every_kind_of_request():
    make = torch.Generator().manual_seed(5)
    draws(torch.randn(len(ROWS), 200, generator=make) * 3, ROWS)


@pytest.mark.parametrize(
    "levels",
    [pytest.param(1, marks=SOAK), pytest.param(2, marks=SOAK), pytest.param(5, marks=SOAK)],
)
def test_ties_are_kept_in_the_order_of_ids(levels):
    make = torch.Generator().manual_seed(levels)
    logits = torch.randint(levels, (len(ROWS), 150), generator=make).float() - 1.0
    draws(logits, ROWS)


@pytest.mark.more
def test_chunks_of_any_size_draw_the_same():
    make = torch.Generator().manual_seed(2)
    logits = torch.randn(2, 300, generator=make)
    rows = [(1.0, 50, 0.9, 0.37), (0.8, 0, 0.95, 0.81)]
    assert draws(logits, rows, chunk=32) == draws(logits, rows, chunk=512)


@SOAK
def test_distribution_over_many_uniforms():
    make = torch.Generator().manual_seed(12)
    logits = (torch.randn(1, 60, generator=make) * 2).expand(32, 60).contiguous()
    draws(logits, [(0.9, 20, 0.9, i / 32) for i in range(32)])
