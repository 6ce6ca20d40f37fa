"""grouped_mm against a loop over rows in float64; its gradient; and how much it holds at a time."""

from __future__ import annotations

import weakref

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from tpx.mxfp4 import Mxfp4, dequantize, quantize
from tpx.ops.grouped_mm import grouped_mm

pytestmark = pytest.mark.usefixtures("both_ways")


def weights(kind, experts, rows, columns, seed=0):
    """(weight, the same as float64 [e, N, K])."""
    generator = torch.Generator().manual_seed(seed)
    full = torch.randn(experts, rows, columns, generator=generator)
    if kind == "plain":
        return full.transpose(1, 2).contiguous(), full.double()
    packed = quantize(full)
    return packed, dequantize(packed, torch.float64)


def setting(kind, counts, rows, columns, spare=0, dtype=torch.float32):
    generator = torch.Generator().manual_seed(1)
    weight, full = weights(kind, len(counts), rows, columns)
    x = torch.randn(sum(counts) + spare, columns, generator=generator, dtype=dtype)
    bias = torch.randn(len(counts), rows, generator=generator, dtype=dtype)
    return x, torch.tensor(counts, dtype=torch.int64), weight, bias, full


def by_rows(x, counts, full, bias):
    """One row at a time, in float64."""
    y = torch.zeros(x.shape[0], full.shape[1], dtype=torch.float64)
    owners = [e for e, count in enumerate(counts.tolist()) for _ in range(count)]
    for r, e in enumerate(owners):
        y[r] = full[e] @ x[r].double() + (0 if bias is None else bias[e].double())
    return y


KINDS = pytest.mark.parametrize("kind", ["mxfp4", "plain"])


@KINDS
@pytest.mark.parametrize("counts", [[3, 0, 5, 1], [0, 0, 0], [0, 9], [4], [1] * 7])
@pytest.mark.parametrize("spare", [0, 4])
def test_every_row_meets_its_own_expert_and_foreign_rows_give_zeros(kind, counts, spare):
    x, counts, weight, bias, full = setting(kind, counts, 10, 64, spare)
    for b in (bias, None):
        got = grouped_mm(x, counts, weight, b)
        assert got.dtype == torch.float32
        torch.testing.assert_close(got.double(), by_rows(x, counts, full, b), rtol=0, atol=2e-5)
        assert not got[counts.sum() :].any()


@KINDS
def test_foreign_rows_are_never_computed(kind):
    x, counts, weight, bias, _ = setting(kind, [2, 3], 6, 32, spare=2)
    x[5:] = torch.nan
    got = grouped_mm(x, counts, weight, bias)
    assert got[:5].isfinite().all()
    assert not got[5:].any()


@KINDS
@pytest.mark.parametrize(("rows", "columns"), [(0, 64), (10, 0), (0, 0)])
def test_a_rank_that_holds_no_block_gives_the_bias_alone(kind, rows, columns):
    x, counts, weight, bias, _ = setting(kind, [2, 0, 1], rows, columns, spare=1)
    got = grouped_mm(x, counts, weight, bias)
    expected = torch.stack([bias[0], bias[0], bias[2], torch.zeros(rows)])
    torch.testing.assert_close(got, expected, rtol=0, atol=0)
    assert not grouped_mm(x, counts, weight, None).any()


@KINDS
def test_no_experts_and_no_rows(kind):
    weight, _ = weights(kind, 0, 6, 32)
    none = torch.zeros(0, dtype=torch.int64)
    assert (
        grouped_mm(torch.ones(3, 32), none, weight, torch.zeros(0, 6)).tolist() == [[0.0] * 6] * 3
    )
    weight, _ = weights(kind, 2, 6, 32)
    empty = grouped_mm(torch.ones(0, 32), torch.tensor([0, 0]), weight, torch.zeros(2, 6))
    assert empty.shape == (0, 6)


@KINDS
def test_bfloat16_rows_give_bfloat16(kind):
    x, counts, weight, bias, full = setting(kind, [3, 2], 8, 64, dtype=torch.bfloat16)
    got = grouped_mm(x, counts, weight, bias)
    assert got.dtype == torch.bfloat16
    expected = by_rows(x, counts, full, bias)
    assert (got.double() - expected).abs().max() <= 2**-7 * expected.abs().max()


@KINDS
def test_the_gradient_of_x_is_that_of_plain_matrices(kind):
    x, counts, weight, bias, full = setting(kind, [3, 0, 4], 10, 64, spare=2, dtype=torch.float64)
    x.requires_grad_()
    generator = torch.Generator().manual_seed(5)
    slope = torch.randn(x.shape[0], 10, generator=generator, dtype=torch.float64)
    grouped_mm(x, counts, weight, bias.requires_grad_()).backward(slope)
    owners = [0] * 3 + [2] * 4
    expected = torch.stack([slope[r] @ full[e] for r, e in enumerate(owners)])
    torch.testing.assert_close(x.grad[:7], expected)
    assert not x.grad[7:].any()
    assert bias.grad is None


def test_more_rows_than_there_are_is_refused():
    x, _, weight, bias, _ = setting("plain", [2, 2], 4, 32)
    with pytest.raises(AssertionError, match="are more than 4 rows"):
        grouped_mm(x, torch.tensor([4, 1]), weight, bias)
    with pytest.raises(AssertionError, match="3 counts for 2 experts"):
        grouped_mm(x, torch.tensor([1, 1, 1]), weight, bias)


class LargeFloats(TorchDispatchMode):
    """The most floating-point memory of at least `size` elements alive at a time, in tensors."""

    def __init__(self, size):
        super().__init__()
        self.size, self.alive, self.most = size, {}, 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        for tensor in torch.utils._pytree.tree_leaves(out):
            if isinstance(tensor, torch.Tensor) and tensor.is_floating_point():
                self.note(tensor.untyped_storage(), tensor.element_size())
        return out

    def note(self, storage, itemsize):
        key = storage._cdata
        if storage.nbytes() // itemsize >= self.size and key not in self.alive:
            self.alive[key] = weakref.finalize(storage, self.alive.pop, key, None)
            self.most = max(self.most, len(self.alive))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_at_most_one_expert_is_dequantised_at_a_time(dtype):
    x, counts, weight, bias, _ = setting("mxfp4", [2, 1, 3, 2], 96, 64, dtype=dtype)
    x.requires_grad_()
    with LargeFloats(96 * 64) as forward:
        y = grouped_mm(x, counts, weight, bias)
    assert forward.most == 1
    assert not forward.alive  # nothing is kept for backward
    with LargeFloats(96 * 64) as backward:
        y.sum().backward()
    assert backward.most == 1


def test_the_count_of_large_tensors_sees_two_where_there_are_two():
    weight, _ = weights("mxfp4", 2, 96, 64)
    with LargeFloats(96 * 64) as mode:
        both = [dequantize(Mxfp4(b, s), torch.bfloat16) for b, s in zip(*weight, strict=True)]
    assert len(both) == mode.most == 2
    with LargeFloats(96 * 64) as mode:
        dequantize(Mxfp4(weight.blocks[0], weight.scales[0]), torch.bfloat16)
    assert mode.most == 1
