"""The name under which torch.library knows these operations; a build for the Hub writes its own."""

from __future__ import annotations

NAMESPACE = "tpx_moe"
