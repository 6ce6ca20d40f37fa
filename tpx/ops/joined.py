"""Matrices that lie one behind the other in memory, as one."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise

import torch
from torch import Tensor


def joined(parts: Sequence[Tensor]) -> Tensor:
    """The parts' rows as one tensor: a view where they follow each other, as the loader puts them
    (plan.forms.JOINED), else a copy."""
    ends = (part.data_ptr() + part.nbytes for part in parts)
    follow = all(end == part.data_ptr() for end, part in zip(ends, parts[1:], strict=False))
    one_storage = all(
        a.untyped_storage().data_ptr() == b.untyped_storage().data_ptr() for a, b in pairwise(parts)
    )
    if not (follow and one_storage and all(part.is_contiguous() for part in parts)):
        return torch.cat([part.detach() for part in parts])
    rows = sum(part.shape[0] for part in parts)
    shape = (rows, *parts[0].shape[1:])
    return parts[0].detach().as_strided(shape, parts[0].stride())
