"""What an LLM gives back: Completion, and Report (what each rank holds and read)."""

from __future__ import annotations

from typing import Literal, NamedTuple

from .mesh import Coords, Mesh

FinishReason = Literal["stop", "length"]


class Completion(NamedTuple):
    """One prompt's continuation.

    text: what the tokens say, up to a stop string; "" where the checkpoint has no tokenizer.
    token_ids: the new tokens, a stop token included. finish_reason: "stop" after a stop token or a
    stop string, "length" at max_tokens or at the model's last position.
    """

    text: str
    token_ids: list[int]
    finish_reason: FinishReason


class RankReport(NamedTuple):
    """One rank's share of a load. bytes_read: of the files; bytes_held: on `device`."""

    rank: int
    coords: Coords
    device: str
    bytes_read: int
    bytes_held: int
    seconds: float


class Report(NamedTuple):
    """The load of a whole job, the same on every rank.

    plan: the plan's path. notes: what the plan leaves to say, such as modules that a dict in
    Hugging Face's form leaves replicated. seconds: of the slowest rank.
    """

    mesh: Mesh
    plan: str
    notes: tuple[str, ...]
    ranks: tuple[RankReport, ...]

    @property
    def bytes_read(self) -> int:
        return sum(rank.bytes_read for rank in self.ranks)

    @property
    def bytes_held(self) -> int:
        return sum(rank.bytes_held for rank in self.ranks)

    @property
    def seconds(self) -> float:
        return max(rank.seconds for rank in self.ranks)
