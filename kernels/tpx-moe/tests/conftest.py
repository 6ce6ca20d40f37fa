"""The package by its path, and triton's interpreter where there is no GPU."""

from __future__ import annotations

import os
import sys
from pathlib import Path

import torch

ROOT = Path(__file__).parent.parent
sys.path[:0] = [str(ROOT / "torch-ext"), str(ROOT / "tests")]
if not torch.cuda.is_available():
    os.environ["TRITON_INTERPRET"] = "1"
