"""JSON from files that nobody vouches for: bounded in memory and time, and strict.

For what lies beside a checkpoint's weights and before them. Knows no format.
"""

from __future__ import annotations

import json
from collections import Counter
from reprlib import Repr
from typing import Any, NoReturn

from .errors import CheckpointError

AGAIN = "download the checkpoint again, whole"
MOST_BYTES = 100_000_000
# A value needs one of these bytes before it, so they bound what parsing allocates: 1.3 GB measured,
# for 100 MB of small keys. A header of 1,000,000 tensors with 4 dimensions each keeps to them.
MOST = {b"{": 1_000_002, b"[": 2_000_000, b":": 4_500_000, b",": 8_000_000}

_shortened = Repr()
_shortened.maxstring = _shortened.maxother = _shortened.maxlong = 80
_shortened.maxlist, _shortened.maxlevel = 8, 3


def damaged(name: str, what: str) -> CheckpointError:
    return CheckpointError(f"`{name}` is damaged: {what}", AGAIN)


def shown(value: Any) -> str:
    """A foreign value for a message: short, whatever its size and depth, and safe to print."""
    if isinstance(value, str) and value.isprintable() and len(value) <= 200:
        return value
    text = _shortened.repr(value)
    return text[1:-1] if isinstance(value, str) else text


def parse_json(data: bytes, name: str, fractions: bool = False) -> Any:
    """UTF-8, no key twice, no NaN, no more of anything than MOST, no depth that exhausts the
    parser. fractions: whether 1.5 is a number here. Raises CheckpointError, calling it `name`."""
    for byte, most in MOST.items():
        if (count := data.count(byte)) > most:
            raise damaged(
                name, f"the JSON has {count} times `{byte.decode()}`, and may have {most}"
            )

    def refuse(text: str) -> NoReturn:
        raise damaged(name, f"`{shown(text)}` where only whole numbers belong")

    def whole(text: str) -> int:
        return refuse(text) if text == "-0" else int(text)

    def no_duplicates(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        found = dict(pairs)
        if len(found) != len(pairs):
            [(twice, _)] = Counter(key for key, _ in pairs).most_common(1)
            raise damaged(name, f"key `{shown(twice)}` appears twice")
        return found

    try:
        return json.loads(
            data.decode("utf-8"),
            object_pairs_hook=no_duplicates,
            parse_constant=refuse,
            parse_float=float if fractions else refuse,
            parse_int=int if fractions else whole,
        )
    except UnicodeDecodeError as error:
        raise damaged(name, f"byte {error.start} of the JSON is not UTF-8") from error
    except RecursionError as error:
        raise damaged(name, "the JSON is nested too deep") from error
    except ValueError as error:  # JSONDecodeError, or an integer too long to convert
        raise damaged(name, f"the JSON does not parse: {error}") from error
