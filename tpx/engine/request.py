"""Request: one sequence on its way through the engine. Knows no text and no tensor."""

from __future__ import annotations

from dataclasses import dataclass, field

from ..results import FinishReason


@dataclass(slots=True, eq=False)
class Request:
    """A prompt and what has been drawn after it.

    id: its number in order of arrival, once it has arrived. limit: tokens in all, prompt included,
    at which it ends. stop_ids: tokens that end it. logprobs: how many of the likeliest tokens are
    reported beside each that is drawn; None: nothing is. all_logits: keep the logits of every
    token.
    cached: tokens whose keys and values are in the cache, or will be once what was launched has
    run; found: of these, those that were there when it was let in. pending: tokens that a launched
    step draws. full, sliding: its pages, entry j for the positions [j*page, (j+1)*page); -1 where
    one was given back because it left the window: the first `gone` ones. keys: of its pages, see
    blocks.page_keys; the first `named` pages can be found by them. places: how often it was given
    pages anew.
    """

    prompt: tuple[int, ...]
    limit: int
    temperature: float = 0.0
    top_p: float = 1.0
    top_k: int = 0
    seed: int = 0
    stop_ids: frozenset[int] = frozenset()
    logprobs: int | None = None
    all_logits: bool = False
    output: list[int] = field(default_factory=list)
    cached: int = 0
    found: int = 0
    pending: int = 0
    finish_reason: FinishReason | None = None
    full: list[int] = field(default_factory=list)
    sliding: list[int] = field(default_factory=list)
    gone: int = 0
    keys: list[bytes] = field(default_factory=list)
    named: int = 0
    places: int = 0
    id: int = -1

    @property
    def known(self) -> int:
        """Tokens whose ids are on the host."""
        return len(self.prompt) + len(self.output)

    @property
    def length(self) -> int:
        """Tokens that it has: prompt, output, and what is being drawn."""
        return self.known + self.pending

    @property
    def most_cached(self) -> int:
        """Tokens that it can ever have in the cache: the last one drawn is never fed back."""
        return max(len(self.prompt), self.limit - 1)

    @property
    def decodes(self) -> bool:
        """Whether all its tokens but the last are in the cache."""
        return self.length - self.cached == 1

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
        elif self.known >= self.limit:
            self.finish_reason = "length"
