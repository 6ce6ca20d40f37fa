"""Everything a user can get wrong, and the exit code each one ends with.

TpxError
├── PlanError        a plan, mesh or flag that cannot work                        exit 2
├── RequestError     a prompt or sampling parameter that cannot be served         exit 2
├── CheckpointError  a file of the model that is missing, damaged or unsupported  exit 3
└── LaunchError      the machine or the ranks: before they start 3, after 4 to 7
"""

from __future__ import annotations

import difflib
from collections.abc import Iterable

EXIT_CODES = {
    0: "ok",
    1: "the answer is no",
    2: "usage, plan or request",
    3: "preflight: checkpoint or machine, before a rank started",
    4: "a rank raised",
    5: "a rank was killed",
    6: "hang",
    7: "rendezvous or network",
    70: "a bug in tpx",
    130: "interrupted (SIGINT)",
    141: "output closed (SIGPIPE)",
    143: "terminated (SIGTERM)",
}


class TpxError(Exception):
    """One sentence with the values, and what to type instead.

    message: no period at the end, values in backticks. hint: what to type, or None. code: which
    proof of a plan failed, a key of plan/codes.py; None for all else.
    """

    exit_code = 70

    def __init__(
        self,
        message: str,
        hint: str | None = None,
        *,
        code: str | None = None,
        exit_code: int | None = None,
    ):
        super().__init__(message)
        self.message = message
        self.hint = hint
        self.code = code
        if hint is not None:
            self.add_note(f"hint: {hint}")  # Python's own traceback shows it
        if exit_code is not None:
            assert exit_code in EXIT_CODES, f"{exit_code=}"
            self.exit_code = exit_code

    def render(self) -> str:
        """The text for people: `error: ...` or `error[P201]: ...`, a blank line, `hint: ...`."""
        code = f"[{self.code}]" if self.code else ""
        text = f"error{code}: {self.message}"
        return text if self.hint is None else f"{text}\n\nhint: {self.hint}"


class PlanError(TpxError):
    exit_code = 2


class RequestError(TpxError):
    exit_code = 2


class CheckpointError(TpxError):
    exit_code = 3


class LaunchError(TpxError):
    exit_code = 3


def nearest(word: str, choices: Iterable[str]) -> list[str]:
    """Up to three of `choices` that look like `word`, the likeliest first."""
    return difflib.get_close_matches(word, list(choices), n=3, cutoff=0.6)


def did_you_mean(word: str, choices: Iterable[str]) -> str:
    """A hint: the likeliest choices for a misspelt word, else all of them."""
    choices = list(choices)
    close = nearest(word, choices)
    if close:
        return f"did you mean {or_list(close)}?"
    return f"use {or_list(choices)}"


def or_list(words: Iterable[object]) -> str:
    """`a`, `b` or `c`."""
    quoted = [f"`{word}`" for word in words]
    return quoted[0] if len(quoted) == 1 else f"{', '.join(quoted[:-1])} or {quoted[-1]}"
