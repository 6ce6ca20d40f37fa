"""Headers as large as may be, made to fill memory: each is refused or read in bounded memory."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
from launching import environment

from tpx.index import MOST_HEADER_BYTES, MOST_TENSORS
from tpx.strict_json import MOST

pytestmark = pytest.mark.more

LIMIT = 2_000_000_000  # bytes of memory, for a header of 100 MB; 1.3 GB were measured
SECONDS = 60  # of one core
READ = """
import resource, sys
from pathlib import Path
from tpx.errors import CheckpointError
from tpx.index import read_header
resource.setrlimit(resource.RLIMIT_DATA, (int(sys.argv[2]),) * 2)
resource.setrlimit(resource.RLIMIT_CPU, (int(sys.argv[3]),) * 2)
try:
    header, _ = read_header(Path(sys.argv[1]), "f")
    print(len(header.tensors), "tensors")
except CheckpointError as error:
    print(error.message)
"""


def filled(unit: bytes, most: int = MOST_HEADER_BYTES) -> bytes:
    head, tail = b'{"a":[0', b"]}"
    return head + unit * min(most, (MOST_HEADER_BYTES - len(head) - len(tail)) // len(unit)) + tail


def tensors(count: int) -> bytes:
    entry = b'"m.%d":{"dtype":"U8","shape":[1],"data_offsets":[%d,%d]}'
    return b"{" + b",".join(entry % (n, n, n + 1) for n in range(count)) + b"}"


STRING = MOST_HEADER_BYTES - 100
BOMBS: dict[str, tuple[Callable[[], bytes], int, str]] = {
    "objects": (lambda: filled(b",{}"), 0, "`f` is damaged: the JSON has 33333331 times `{`"),
    "lists": (lambda: filled(b",[]"), 0, "`f` is damaged: the JSON has 33333331 times `[`"),
    "lists, as many as may be": (
        lambda: filled(b",[]", MOST[b"["] - 1), 0, "`f` is damaged: tensor `a` needs dtype"
    ),
    "numbers": (
        lambda: filled(b",1234567890", MOST[b","]), 0, "`f` is damaged: tensor `a` needs dtype"
    ),
    "keys": (
        lambda: b"{" + b",".join(b'"%d":1' % n for n in range(MOST[b":"])) + b"}",
        0,
        "`f` is damaged: tensor `0` needs dtype",
    ),
    "keys, the last one again": (
        lambda: b"{" + b",".join(b'"%d":1' % n for n in range(MOST[b":"] - 1)) + b',"0":1}',
        0,
        "`f` is damaged: key `0` appears twice",
    ),
    "wide letters": (
        lambda: b'{"' + b"a" * STRING + "\U0001f600".encode() + b'":1}',
        0,
        "`f` is damaged: a tensor has the name `aaaa",
    ),
    "long numbers": (
        lambda: filled(b"," + b"9" * 4300), 0, "`f` is damaged: tensor `a` needs dtype"
    ),
    "nesting": (
        lambda: b'{"a":' + b"[" * MOST[b"["], 0, "`f` is damaged: the JSON is nested too deep"
    ),
    "tensors, as many as may be": (
        lambda: tensors(MOST_TENSORS), MOST_TENSORS, "1000000 tensors"
    ),
}  # fmt: skip


@pytest.mark.parametrize(
    "case", [pytest.param(n, marks=[pytest.mark.soak] * (i > 0)) for i, n in enumerate(BOMBS)]
)
def test_a_header_made_to_fill_memory_ends_well(tmp_path, case):
    make, data, wanted = BOMBS[case]
    text = make()
    assert len(text) <= MOST_HEADER_BYTES
    path = tmp_path / "f"
    with path.open("wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        file.truncate(8 + len(text) + data)
    words = [sys.executable, "-c", READ, str(path), str(LIMIT), str(SECONDS)]
    root = Path(__file__).parents[1]
    done = subprocess.run(words, cwd=root, capture_output=True, text=True, env=environment())
    path.unlink()
    assert done.returncode == 0, done.stderr[-2000:]
    assert done.stdout.startswith(wanted), done.stdout[:400]
