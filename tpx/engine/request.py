"""Request: one sequence on its way through the engine. Knows no text and no tensor."""

from __future__ import annotations

from dataclasses import dataclass, field

from ..results import FinishReason


@dataclass(slots=True)
class Request:
    """A prompt and what has been drawn after it.

    limit: tokens in all, prompt included, at which it ends. stop_ids: tokens that end it. cached:
    tokens whose keys and values are in the cache, or will be once what was launched has run.
    pending: tokens that a launched step draws. all_logits: keep the logits of every token.
    full, sliding: its pages, entry j for the positions [j*page, (j+1)*page); -1 where one was given
    back because it left the window.
    """

    id: int
    prompt: tuple[int, ...]
    limit: int
    temperature: float = 0.0
    top_p: float = 1.0
    top_k: int = 0
    seed: int = 0
    stop_ids: frozenset[int] = frozenset()
    all_logits: bool = False
    output: list[int] = field(default_factory=list)
    cached: int = 0
    pending: int = 0
    finish_reason: FinishReason | None = None
    full: list[int] = field(default_factory=list)
    sliding: list[int] = field(default_factory=list)

    @property
    def length(self) -> int:
        """Tokens that it has: prompt, output, and what is being drawn."""
        return len(self.prompt) + len(self.output) + self.pending

    @property
    def most_cached(self) -> int:
        """Tokens that it can ever have in the cache: the last one drawn is never fed back."""
        return max(len(self.prompt), self.limit - 1)

    def tokens(self, start: int, stop: int) -> list[int]:
        """The ids at positions [start, stop)."""
        prompt = self.prompt[start:stop]
        rest = self.output[max(0, start - len(self.prompt)) : max(0, stop - len(self.prompt))]
        return [*prompt, *rest]

    def append(self, token: int) -> None:
        """Takes the first pending token, and ends where it is a stop token or the last one
        allowed."""
        assert self.finish_reason is None
        assert self.pending > 0
        self.pending -= 1
        self.output.append(token)
        if token in self.stop_ids:
            self.finish_reason = "stop"
        elif len(self.prompt) + len(self.output) >= self.limit:
            self.finish_reason = "length"
