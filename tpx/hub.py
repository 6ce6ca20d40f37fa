"""Finds a checkpoint's folder: a local one, or the Hugging Face Hub's, through its own client.

Only the files that tpx reads are fetched; the Hub's cache and its offline mode are respected.
"""

from __future__ import annotations

import re
from pathlib import Path

from .errors import CheckpointError

NEEDED_FILES = [
    "config.json",
    "generation_config.json",
    "tokenizer*.json",
    "chat_template*",
    "model*.safetensors",
    "model.safetensors.index.json",
]
HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*")


def find_model(path_or_hub_id: str, revision: str | None = None) -> Path:
    """The folder that holds the checkpoint. Raises CheckpointError where there is none."""
    given = str(path_or_hub_id)
    folder = Path(given).expanduser()
    if folder.is_dir():
        return folder
    if folder.exists():
        raise CheckpointError(f"`{given}` is a file", f"give its folder: `{folder.parent}`")
    if HUB_ID.fullmatch(given) and not given.startswith("."):
        return _from_hub(given, revision)
    if "/" in given or given.startswith((".", "~")):
        raise CheckpointError(
            f"folder `{given}` does not exist", "give the folder that holds `config.json`"
        )
    raise CheckpointError(
        f"`{given}` is neither a folder nor a Hub id",
        "give a folder, or a Hub id of the form `owner/name`",
    )


def _from_hub(hub_id: str, revision: str | None) -> Path:
    # Imported here: a local folder needs neither the client nor its 0.3 s.
    from huggingface_hub import constants, errors, snapshot_download

    # What fails in transit is of the class that the client's HTTP package gives all its errors
    # (httpx, httpx2), or an OSError (requests, sockets, the disk), or Xet's own.
    in_transit: tuple[type[Exception], ...] = (OSError, errors.HfHubHTTPError.__bases__[0])
    in_transit += (getattr(errors, "XetDownloadError", OSError),)

    at = f" at revision `{revision}`" if revision else ""
    folder_hint = f"or give a folder: `{hub_id}` is none here"
    try:
        return Path(snapshot_download(hub_id, revision=revision, allow_patterns=NEEDED_FILES))
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
        if constants.HF_HUB_OFFLINE:
            raise CheckpointError(
                f"`{hub_id}`{at} is not in the Hub's cache, and HF_HUB_OFFLINE forbids to fetch it",
                f"unset HF_HUB_OFFLINE, {folder_hint}",
            ) from error
        raise _unreachable(hub_id, at, error) from error
    except in_transit as error:
        raise _unreachable(hub_id, at, error) from error


def _unreachable(hub_id: str, at: str, error: Exception) -> CheckpointError:
    cause = error.__cause__ or error
    return CheckpointError(
        f"`{hub_id}`{at} is not in the Hub's cache and cannot be fetched ({type(cause).__name__})",
        f"check the network, or give a folder: `{hub_id}` is none here",
    )
