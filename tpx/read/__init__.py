"""Reads one rank's shards from safetensors files into one allocation: its byte plan and no other
byte. Threads, buffers and page-locked memory live here only. Knows no model and no family.
"""

from .arena import DTYPES, Arena, Memory
from .copies import move, scatter
from .files import Files, Source, fill
from .pipeline import Limits, load_spans
from .ring import Buffer, Ring
from .stats import Progress, ReadStats

__all__ = [
    "DTYPES",
    "Arena",
    "Buffer",
    "Files",
    "Limits",
    "Memory",
    "Progress",
    "ReadStats",
    "Ring",
    "Source",
    "fill",
    "load_spans",
    "move",
    "scatter",
]
