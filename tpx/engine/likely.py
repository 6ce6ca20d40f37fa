"""How likely the tokens were that a step has drawn, for the requests that ask."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from ..results import Likely
from .scheduler import Chunk


def likeliest(
    drawing: Sequence[Chunk], logits_BV: torch.Tensor, tokens: Sequence[int]
) -> list[Likely | None]:
    """One for each chunk; None where its request does not ask."""
    found: list[Likely | None] = [None] * len(drawing)
    rows = [row for row, chunk in enumerate(drawing) if chunk.request.logprobs is not None]
    if not rows:
        return found
    at = torch.tensor(rows, device=logits_BV.device)
    logprobs_MV = logits_BV[at].float().log_softmax(-1)
    counts = [drawing[row].request.logprobs or 0 for row in rows]
    top = logprobs_MV.topk(min(max(counts), logits_BV.shape[1]))
    values, ids = top.values.tolist(), top.indices.tolist()
    drawn = torch.tensor([tokens[row] for row in rows], device=logits_BV.device)
    own = logprobs_MV.gather(1, drawn[:, None])[:, 0].tolist()
    for place, (row, count) in enumerate(zip(rows, counts, strict=True)):
        best = zip(ids[place][:count], values[place][:count], strict=True)
        found[row] = Likely(own[place], tuple(best))
    return found
