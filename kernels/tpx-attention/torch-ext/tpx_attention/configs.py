"""Block sizes, measured once a device and shape and kept as JSON beside this file. No torch."""

from __future__ import annotations

import functools
import json
import re
from pathlib import Path
from typing import Any

DEFAULT = "default"


@functools.cache
def table(device_name: str) -> dict[str, Any]:
    """configs/<device>.json, else configs/default.json."""
    folder = Path(__file__).parent / "configs"
    path = folder / f"{re.sub('[^A-Za-z0-9]+', '_', device_name)}.json"
    if not path.is_file():
        path = folder / f"{DEFAULT}.json"
    return json.loads(path.read_text())  # type: ignore[no-any-return]


def rows_entry(entries: dict[str, Any], rows: int) -> dict[str, Any] | None:
    """The entry of the smallest row count that is at least `rows`."""
    fitting = [int(key) for key in entries if int(key) >= rows]
    return entries[str(min(fitting))] if fitting else None


def linear(
    device_name: str, n: int, k: int, rows: int, normed: bool = False
) -> dict[str, Any] | None:
    """What runs [rows, k] x [k, n], `normed` with the norm before it: {"kernel": "gemv" |
    "skinny" | "torch", sizes}; None: no entry is for so many rows."""
    tables = table(device_name)["linear"]
    found = tables.get(f"{n}x{k}", tables["*"])
    return rows_entry(tables.get(f"{n}x{k}+norm", found) if normed else found, rows)


def attention(device_name: str, phase: str, rows: int) -> dict[str, Any]:
    """phase: decode_window, decode_full, prefill_window or prefill_full. More rows than the table
    knows run as its most."""
    entries = table(device_name)["attention"][phase]
    return rows_entry(entries, min(rows, max(map(int, entries)))) or {}
