"""What an LLM gives back: Completion, and Report (what each rank holds and read)."""

from __future__ import annotations

from typing import Literal, NamedTuple

from .kernels import Choice
from .mesh import Coords, Mesh

FinishReason = Literal["stop", "length", "cancelled"]


class Likely(NamedTuple):
    """How likely a token was before temperature, top-k and top-p. logprob: of the token drawn, to
    the base e. top: the likeliest tokens, (id, logprob), the likeliest first."""

    logprob: float
    top: tuple[tuple[int, float], ...]


class Completion(NamedTuple):
    """One prompt's continuation.

    text: what the tokens say, up to a stop string; "" where the checkpoint has no tokenizer.
    token_ids: the new tokens, a stop token included. finish_reason: "stop" after a stop token or a
    stop string, "length" at max_tokens or at the last position of a sequence. logprobs: of each
    token, where they were asked for.
    """

    text: str
    token_ids: list[int]
    finish_reason: FinishReason
    logprobs: list[Likely] | None = None


class Result(NamedTuple):
    """What a Request gives: `n` completions. id: the request's, else its number from 0 on."""

    id: str | int
    completions: list[Completion]


class Piece(NamedTuple):
    """What a step adds to one of a request's continuations.

    choice: which of them, from 0 on. text: whole characters only; what may begin a stop string
    comes later. completion: what the pieces have made, with the last one; else None.
    """

    choice: int
    text: str
    token_ids: list[int]
    completion: Completion | None


class RankReport(NamedTuple):
    """One rank's share of a load.

    bytes_read: of the files, by this rank. bytes_kept: what its shards have there. bytes_received:
    of these, what other ranks of its machine have read for it. bytes_held: what
    they have on `device` in their final form. seconds: in all; read_seconds and copy_seconds
    overlap. device_peak: the most device memory while loading, as a multiple of bytes_held; None on
    a CPU. host_peak: the most bytes of anonymous memory beyond the weights.
    """

    rank: int
    coords: Coords
    device: str
    bytes_read: int
    bytes_kept: int
    bytes_received: int
    bytes_held: int
    seconds: float
    read_seconds: float
    copy_seconds: float
    prepare_seconds: float
    device_peak: float | None
    host_peak: int

    @property
    def read_amplification(self) -> float:
        """Bytes read for each that is kept; below 1 where other ranks have read for this one."""
        return amplification(self.bytes_read, self.bytes_kept)


class Report(NamedTuple):
    """The load of a whole job, the same on every rank.

    plan: the plan's path. notes: what the plan leaves to say, such as modules that a dict in
    Hugging Face's form leaves replicated. kernels: what runs each operation, as rank 0 has it.
    Seconds and peaks: of the rank that has the most.
    """

    mesh: Mesh
    plan: str
    notes: tuple[str, ...]
    ranks: tuple[RankReport, ...]
    kernels: tuple[Choice, ...] = ()

    @property
    def bytes_read(self) -> int:
        return sum(rank.bytes_read for rank in self.ranks)

    @property
    def bytes_kept(self) -> int:
        return sum(rank.bytes_kept for rank in self.ranks)

    @property
    def bytes_held(self) -> int:
        return sum(rank.bytes_held for rank in self.ranks)

    @property
    def read_amplification(self) -> float:
        """Bytes read for each that is kept; below 1 where ranks read for each other."""
        return amplification(self.bytes_read, self.bytes_kept)

    @property
    def seconds(self) -> float:
        return max(rank.seconds for rank in self.ranks)

    @property
    def read_seconds(self) -> float:
        return max(rank.read_seconds for rank in self.ranks)

    @property
    def copy_seconds(self) -> float:
        return max(rank.copy_seconds for rank in self.ranks)

    @property
    def prepare_seconds(self) -> float:
        return max(rank.prepare_seconds for rank in self.ranks)

    @property
    def device_peak(self) -> float | None:
        return max((r.device_peak for r in self.ranks if r.device_peak is not None), default=None)

    @property
    def host_peak(self) -> int:
        return max(rank.host_peak for rank in self.ranks)


def amplification(bytes_read: int, bytes_kept: int) -> float:
    return bytes_read / bytes_kept if bytes_kept else 1.0
