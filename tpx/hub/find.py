"""Finds a checkpoint's folder: a local one, or the Hugging Face Hub's, through its own client.

For a Hub id the commit is pinned, and its small files and the headers of its shards are fetched:
enough to prove any plan. Only the files that tpx reads are; offline mode is respected.
"""

from __future__ import annotations

import os
import re
import threading
from collections.abc import Sequence
from fnmatch import fnmatch
from functools import partial
from pathlib import Path, PurePosixPath

from ..errors import CheckpointError
from ..index import INDEX, SINGLE
from ..strict_json import parse_json
from .client import COMMIT, Listing, client_errors, in_transit, is_offline, list_repository
from .source import Source
from .store import (
    Repository,
    disk_errors,
    home_of,
    is_partial,
    locked,
    open_shard,
    ref_of,
    write_repository,
    write_text,
)
from .transfer import describe, fetch_header, in_parallel

NEEDED_FILES = [
    "config.json",
    "generation_config.json",
    "tokenizer*.json",
    "chat_template*",
    "model*.safetensors",
    "model.safetensors.index.json",
]
HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*")
AUTO = "auto"
DOWNLOADS = (AUTO, "full", "partial")
HEADERS = "headers"  # for who fetches later what it needs


def find_model(path_or_hub_id: str, revision: str | None = None, download: str = AUTO) -> Path:
    """The folder that holds the checkpoint. Raises CheckpointError where there is none.

    Of a Hub id it may hold the headers alone: `is_partial` says so, and `holding` fetches more.
    download: "full" fetches whole files, as the Hub's client does.
    """
    given = str(path_or_hub_id)
    folder = Path(given).expanduser()
    if os.path.isdir(folder):
        return folder
    if os.path.exists(folder):
        raise CheckpointError(f"`{given}` is a file", f"give its folder: `{folder.parent}`")
    if HUB_ID.fullmatch(given) and not given.startswith("."):
        find = find_whole if download == "full" else _find_headers
        return find(given, revision)
    if "/" in given or given.startswith((".", "~")):
        raise CheckpointError(
            f"folder `{given}` does not exist", "give the folder that holds `config.json`"
        )
    raise CheckpointError(
        f"`{given}` is neither a folder nor a Hub id",
        "give a folder, or a Hub id of the form `owner/name`",
    )


def find_whole(hub_id: str, revision: str | None) -> Path:
    """All files, whole, in the Hub's own cache."""
    from huggingface_hub import snapshot_download

    with client_errors(hub_id, revision):
        return Path(snapshot_download(hub_id, revision=revision, allow_patterns=NEEDED_FILES))


def cached_whole(hub_id: str, commit: str) -> Path | None:
    """Where another download has left this commit, with every file that is needed."""
    from huggingface_hub import try_to_load_from_cache

    config = try_to_load_from_cache(hub_id, "config.json", revision=commit)
    if not isinstance(config, str):
        return None
    folder = Path(config).parent
    names = [path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.exists()]
    shards, named = _shards(folder, names)
    return folder if shards and len(shards) == named else None


def _find_headers(hub_id: str, revision: str | None) -> Path:
    """A commit that was fetched before stays, and no network is asked; a branch that is named is
    asked for again."""
    kept = _kept(hub_id, revision)
    asks = revision is not None and not COMMIT.fullmatch(revision) and not is_offline()
    if kept is not None and not asks:
        return kept
    from huggingface_hub import errors

    refusals = errors.RepositoryNotFoundError, errors.RevisionNotFoundError
    try:
        listing = list_repository(hub_id, revision)
    except in_transit() as error:
        if kept is not None and not isinstance(error, refusals):
            return kept
        return find_whole(hub_id, revision)  # out of the client's cache, or it says what is wrong
    whole = cached_whole(hub_id, listing.commit)
    return whole if whole is not None else _fetch_headers(hub_id, revision, listing)


def _kept(hub_id: str, revision: str | None) -> Path | None:
    ref = ref_of(hub_id, revision)
    commit = revision or ""
    if not COMMIT.fullmatch(commit):
        commit = ref.read_text() if ref.is_file() else ""
    if not COMMIT.fullmatch(commit):
        return None
    folder = home_of(hub_id) / commit
    return cached_whole(hub_id, commit) or (folder if is_partial(folder) else None)


def _fetch_headers(hub_id: str, revision: str | None, listing: Listing) -> Path:
    """Makes the commit's folder; complete once its record is there."""
    home = home_of(hub_id)
    folder = home / listing.commit
    with disk_errors(home), locked(home, exclusive=True):
        if not is_partial(folder):
            names = [name for name in listing.names if _wanted(name)]
            _fetch_small(hub_id, listing.commit, folder, names)
            _fetch_shards(hub_id, listing.commit, folder, _shards(folder, names)[0])
        write_text(ref_of(hub_id, revision), listing.commit)
    return folder


def _wanted(name: str) -> bool:
    """Names come from the network: none leads out of the folder."""
    path = PurePosixPath(name)
    inside = not path.is_absolute() and ".." not in path.parts and "\\" not in name
    return inside and any(fnmatch(name, pattern) for pattern in NEEDED_FILES)


def _fetch_small(hub_id: str, commit: str, folder: Path, names: Sequence[str]) -> None:
    from huggingface_hub import hf_hub_download

    with client_errors(hub_id, commit):
        for name in names:
            if not name.endswith(".safetensors"):
                hf_hub_download(hub_id, name, revision=commit, local_dir=folder)


def _shards(folder: Path, names: Sequence[str]) -> tuple[list[str], int]:
    """The shards among `names`, and how many the index file names; CheckpointIndex says what is
    wrong with it."""
    if SINGLE in names:
        return [SINGLE], 1
    if INDEX not in names:
        return [], 0
    found = parse_json((folder / INDEX).read_bytes(), INDEX)
    weight_map = found.get("weight_map") if isinstance(found, dict) else None
    values = weight_map.values() if isinstance(weight_map, dict) else ()
    named = {value for value in values if isinstance(value, str)}
    return sorted(named.intersection(names)), len(named)


def _fetch_shards(hub_id: str, commit: str, folder: Path, shards: Sequence[str]) -> None:
    sources = {shard: Source(hub_id, commit, shard) for shard in shards}
    found = describe(sources)

    def fetch(shard: str, ending: threading.Event) -> None:
        with open_shard(folder, shard, found[shard]) as file:
            fetch_header(sources[shard], file, ending)

    in_parallel([partial(fetch, shard) for shard in shards])
    write_repository(folder, Repository(hub_id, commit, found))
