"""What `tpx bench latency|throughput|load` is asked for, as one JSON argument to every rank."""

from __future__ import annotations

import json
import random
from itertools import product
from typing import Any, NamedTuple

SWITCHES = {"use_kernels": "kernels", "graphs": "graphs", "prefix_cache": "prefix cache"}
OURS = "tpx"


class Lengths(NamedTuple):
    """Tokens, from `least` to `most`, all as likely."""

    least: int
    most: int

    def draw(self, source: random.Random) -> int:
        return source.randint(self.least, self.most)


class Way(NamedTuple):
    """One way of running tpx. name: says what is switched where that is compared."""

    name: str
    use_kernels: bool
    graphs: bool
    prefix_cache: bool


class Question(NamedTuple):
    """A prompt, as ids, and how many tokens shall follow it."""

    prompt: list[int]
    tokens: int


class Asked(NamedTuple):
    """batches: sequences at once; of `throughput` the most at a time. rounds: of each way, of which
    the median counts. rate: requests a second, None for all at once. shared: tokens that all
    prompts of `throughput` begin with. peer: also transformers. file: where rank 0 writes."""

    bench: str
    file: str
    dtype: str | None
    ways: list[Way]
    rounds: int
    input: Lengths = Lengths(128, 128)
    output: Lengths = Lengths(128, 128)
    batches: tuple[int, ...] = (1,)
    requests: int = 0
    rate: float | None = None
    shared: int = 0
    seed: int = 0
    peer: bool = False

    @property
    def most_tokens(self) -> int:
        """Of a sequence."""
        return self.input.most + self.output.most

    def to_json(self) -> str:
        return json.dumps(self._asdict())

    @classmethod
    def from_json(cls, text: str) -> Asked:
        told: dict[str, Any] = json.loads(text)
        told["ways"] = [Way(*way) for way in told["ways"]]
        told["input"], told["output"] = Lengths(*told["input"]), Lengths(*told["output"])
        told["batches"] = tuple(told["batches"])
        return cls(**told)

    def questions(self, count: int, vocabulary: int, number: int) -> list[Question]:
        """Of round `number`, alike on all ranks: random ids, so that no prompt has come before."""
        start = random.Random(self.seed)
        shared = [start.randrange(vocabulary) for _ in range(self.shared)]
        source = random.Random(f"{self.seed} {number}")
        found = []
        for _ in range(count):
            length, tokens = self.input.draw(source), self.output.draw(source)
            ids = [source.randrange(vocabulary) for _ in range(length)]
            found.append(Question((shared + ids)[: max(length, 1)], tokens))
        return found

    def arrivals(self) -> list[float]:
        """Seconds from the start at which the requests come: a Poisson process, or all at once."""
        if self.rate is None:
            return [0.0] * self.requests
        source, now, found = random.Random(f"{self.seed} arrivals"), 0.0, []
        for _ in range(self.requests):
            found.append(now)
            now += source.expovariate(self.rate)
        return found


def ways_of(switches: dict[str, str]) -> list[Way]:
    """Every combination. switches: of each of SWITCHES `on`, `off` or `both`."""
    compared = [name for name in SWITCHES if switches[name] == "both"]
    values = [("on", "off") if name in compared else (switches[name],) for name in SWITCHES]
    found = []
    for chosen in product(*values):
        told = dict(zip(SWITCHES, chosen, strict=True))
        words = [OURS, *(f"{SWITCHES[name]} {told[name]}" for name in compared)]
        found.append(Way(", ".join(words), *(told[name] == "on" for name in SWITCHES)))
    return found
