"""Where a checkpoint is: a local folder, the Hub's cache, or the part of it that ranks need.

Knows files and their bytes, no plan. The Hub is reached through its own client alone.
"""

from .find import AUTO, DOWNLOADS, HEADERS, NEEDED_FILES, cached_whole, find_model, find_whole
from .sparse import BLOCK
from .store import Needed, holding, is_partial, missing, read_repository
from .transfer import Report

__all__ = [
    "AUTO",
    "BLOCK",
    "DOWNLOADS",
    "HEADERS",
    "NEEDED_FILES",
    "Needed",
    "Report",
    "cached_whole",
    "find_model",
    "find_whole",
    "holding",
    "is_partial",
    "missing",
    "read_repository",
]
