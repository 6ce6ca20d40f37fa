"""What `auto` plans for: this machine's GPUs and their links, or hardware that is elsewhere."""

from __future__ import annotations

from collections.abc import Mapping

from ..plan.wants import Wants
from .hardware import Hardware, product_here
from .links_file import find_links


def wants_for(hardware: Hardware, batch: int | None, environ: Mapping[str, str]) -> Wants:
    """batch: sequences, where they are known. A GPU holds no more than it has; what the CPU's
    memory allows is left to the user."""
    product = hardware.elsewhere or product_here(hardware.device)
    memory = None if product.memory is None else int(product.memory.value)
    links = find_links(product, hardware.topology, environ=environ)
    return Wants(hardware.world, memory, batch=batch, links=links)
