"""The Hub's own client: what it says of a repository, and its errors in the words of tpx.

huggingface_hub is imported inside functions: a local folder needs neither it nor its 0.3 s.
"""

from __future__ import annotations

import re
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from itertools import count
from typing import NamedTuple

from ..errors import CheckpointError

COMMIT = re.compile(r"[0-9a-f]{40}")
LATER = (408, 429, 500, 502, 503, 504)  # statuses after which the same request may succeed


class Patience(NamedTuple):
    """attempts: without one more byte. first, most: seconds between two, doubled each time; what
    the server asks for counts up to `most`, the time of the Hub's window of requests."""

    attempts: int = 6
    first: float = 0.5
    most: float = 300.0

    def seconds(self, failures: int, wanted: float | None) -> float:
        """To wait after so many failures."""
        wait = self.first * 2.0 ** (failures - 1) if wanted is None else wanted
        return min(wait, self.most)


class AskAgain(Exception):
    """The same request may succeed later. wait: seconds, where the server or the cause says so."""

    def __init__(self, reason: str, wait: float | None = None):
        super().__init__(reason)
        self.reason, self.wait = reason, wait


class Listing(NamedTuple):
    """A commit of a repository, and the names of its files."""

    commit: str
    names: tuple[str, ...]


def in_transit() -> tuple[type[Exception], ...]:
    """What fails on the way: the class that the client's HTTP package gives all its errors (httpx,
    httpx2), an OSError (sockets, the disk), or Xet's own."""
    from huggingface_hub import errors

    found: tuple[type[Exception], ...] = (OSError, errors.HfHubHTTPError.__bases__[0])
    return (*found, getattr(errors, "XetDownloadError", OSError))


def is_offline() -> bool:
    from huggingface_hub import constants

    return bool(constants.HF_HUB_OFFLINE)


def list_repository(hub_id: str, revision: str | None, patience: Patience | None = None) -> Listing:
    """Raises the client's own errors: its cache may still have what is wanted."""
    from huggingface_hub import HfApi, errors

    patience = patience or Patience(attempts=3)
    for failures in count(1):
        try:
            found = HfApi().model_info(hub_id, revision=revision)
            break
        except errors.HfHubHTTPError as error:
            if error.response.status_code not in LATER or failures >= patience.attempts:
                raise
            time.sleep(patience.seconds(failures, wanted_wait(error.response.headers)))
    names = tuple(file.rfilename for file in found.siblings or ())
    if found.sha is None or not COMMIT.fullmatch(found.sha):
        raise CheckpointError(f"the Hub says that `{hub_id}` is at commit `{found.sha}`")
    return Listing(found.sha, names)


def wanted_wait(headers: Mapping[str, str]) -> float | None:
    """Seconds that the server asks for: `Retry-After: 7`, or `RateLimit: "api";r=0;t=7`."""
    said = headers.get("Retry-After", "")
    if said.strip().isdecimal():
        return float(said)
    limit = re.search(r";\s*t=(\d+)", headers.get("RateLimit", ""))
    return float(limit[1]) if limit else None


@contextmanager
def client_errors(hub_id: str, revision: str | None) -> Iterator[None]:
    """Turns what the client raises into a CheckpointError."""
    from huggingface_hub import errors

    at = f" at revision `{revision}`" if revision else ""
    folder_hint = f"or give a folder: `{hub_id}` is none here"
    try:
        yield
    except errors.GatedRepoError as error:
        raise CheckpointError(
            f"`{hub_id}` needs permission on the Hub",
            f"accept its terms at https://huggingface.co/{hub_id}, then run `hf auth login`",
        ) from error
    except errors.RevisionNotFoundError as error:
        raise CheckpointError(
            f"`{hub_id}` has no revision `{revision}` on the Hub",
            "leave the revision out for the newest one",
        ) from error
    except errors.RepositoryNotFoundError as error:
        raise CheckpointError(
            f"there is no `{hub_id}` on the Hub that you may read",
            f"check the spelling, run `hf auth login` if it is private, {folder_hint}",
        ) from error
    except (errors.LocalEntryNotFoundError, errors.OfflineModeIsEnabled) as error:
        if is_offline():
            raise CheckpointError(
                f"`{hub_id}`{at} is not in the Hub's cache, and HF_HUB_OFFLINE forbids to fetch it",
                f"unset HF_HUB_OFFLINE, {folder_hint}",
            ) from error
        raise _unreachable(hub_id, at, error) from error
    except in_transit() as error:
        raise _unreachable(hub_id, at, error) from error


def _unreachable(hub_id: str, at: str, error: Exception) -> CheckpointError:
    cause = error.__cause__ or error
    return CheckpointError(
        f"`{hub_id}`{at} is not in the Hub's cache and cannot be fetched ({type(cause).__name__})",
        f"check the network, or give a folder: `{hub_id}` is none here",
    )
