"""The only shard arithmetic in the repository: where each of `parts` nearly equal pieces lies."""

from __future__ import annotations

from itertools import pairwise


def split(size: int, parts: int, unit: int = 1) -> list[tuple[int, int]]:
    """Cuts [0, size) into `parts` contiguous ranges, balanced to one `unit`.

    The first ranges are the longer ones: split(90, 4) has lengths 23, 23, 22, 22. With more parts
    than units the last ranges are empty. `unit` must divide `size`.
    """
    assert min(size + 1, parts, unit) > 0, f"{size=} {parts=} {unit=}"
    assert size % unit == 0, f"{size=} is no multiple of {unit=}"
    short, extra = divmod(size // unit, parts)
    starts = [unit * (i * short + min(i, extra)) for i in range(parts + 1)]
    return list(pairwise(starts))
