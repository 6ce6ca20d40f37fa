"""What a step of the engine holds beside weights and KV cache: pages, logits, activations.

Pages and logits follow from the engine's sizes and are exact. Activations are estimated: the
tensors of the reference operations that live at once, at the fullest moment of a layer.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import NamedTuple

from ..families.spec import ModelSpec
from ..families.steps import ITEM_BYTES, Cut, DispatchName, MoE, ranks_reached
from ..mesh import Mesh
from .memory import kv_bytes

PAGE = 16  # tokens of a page of the engine's cache
STEP_TOKENS = 512  # tokens that one rank computes in one step of the engine at most
WIDE = 4  # bytes of a float32


class Load(NamedTuple):
    """What is asked of a job: `batch` sequences, dealt to the dp groups, of `context` tokens."""

    context: int
    batch: int

    def sequences(self, mesh: Mesh) -> int:
        """Of one dp group, the first of which gets the most."""
        return -(-self.batch // mesh.dp)

    def step(self, mesh: Mesh) -> int:
        """Tokens that one rank computes in one step."""
        return min(STEP_TOKENS, self.context * self.sequences(mesh))


def pages_bytes(spec: ModelSpec, kv_heads: int, load: Load, mesh: Mesh) -> int:
    """What the engine's cache takes beyond its tokens: whole pages, and room to grow in a step."""
    sequences, step = load.sequences(mesh), load.step(mesh)
    whole = -(-load.context // PAGE)
    window = -(-(spec.sliding_window + PAGE - 1) // PAGE)
    full = 1 + sequences * whole
    sliding = -(-step // PAGE) + sequences * min(whole, window + 1)
    layers = full * spec.layer_types.count("full_attention")
    layers += sliding * spec.layer_types.count("sliding_attention")
    held = 2 * layers * PAGE * kv_heads * spec.head_dim * ITEM_BYTES[spec.dtype]
    return held - kv_bytes(spec, kv_heads, load.context, sequences)


def logits_bytes(spec: ModelSpec, load: Load, mesh: Mesh) -> int:
    """float32 rows over the whole vocabulary, one a sequence that draws its next token."""
    rows = min(load.sequences(mesh), load.step(mesh))
    return rows * spec.vocab_size * WIDE


def moments(
    spec: ModelSpec, mesh: Mesh, cuts: Mapping[str, Cut], dispatch: DispatchName, load: Load
) -> dict[str, int]:
    """Bytes that live at once in the attention, the experts and the head of a step."""
    step, item = load.step(mesh), ITEM_BYTES[spec.dtype]
    hidden = 2 * step * spec.hidden_size * item  # the residual, and what its norm gives
    rows = min(load.sequences(mesh), step)
    tables = [cuts[name].size for name in ("V_head", "V") if name in cuts]
    gathered = spec.vocab_size if tables[0] < spec.vocab_size else 0
    if item == WIDE:  # the last of them is the logits themselves, see logits_bytes
        gathered -= spec.vocab_size
    return {
        "attention": hidden + _attention(spec, cuts, step, load.context),
        "experts": hidden + _experts(spec, mesh, cuts, dispatch, step),
        "head": rows * (tables[0] + gathered) * item,
    }


def _attention(spec: ModelSpec, cuts: Mapping[str, Cut], step: int, context: int) -> int:
    """One sequence's queries of the step against the keys that the layer that sees most sees."""
    if "full_attention" not in spec.layer_types:
        context = min(context, spec.sliding_window + step)
    item = ITEM_BYTES[spec.dtype]
    queries, keys = cuts["Q"].size, cuts["KV"].size
    width = spec.head_dim
    projected = step * (2 * queries + 2 * keys) * width * item
    read = 2 * context * keys * width * (item + WIDE)  # keys and values: as stored, in float32
    # Masked scores, the same with the sinks beside them, and their softmax.
    scores = 3 * queries * step * context * WIDE
    return projected + read + scores + step * context


def _experts(
    spec: ModelSpec, mesh: Mesh, cuts: Mapping[str, Cut], dispatch: DispatchName, step: int
) -> int:
    """Rows before and after the experts, the larger of the two moments inside, one matrix."""
    item, hidden, inner = ITEM_BYTES[spec.dtype], spec.hidden_size, cuts["I"].size
    arrived, pairs = rows_at_experts(spec, mesh, dispatch, step)
    moved = arrived * hidden * item if dispatch in ("gather", "all_to_all") else 0
    activated = pairs * (2 * inner * item + 6 * inner * WIDE)  # gate and up; swiglu in float32
    combined = 2 * pairs * hidden * item  # the outputs, and again in the tokens' order
    matrix = 2 * hidden * 2 * inner * item  # one expert's, unpacked
    return round(moved + pairs * hidden * item + max(activated, combined) + matrix)


def rows_at_experts(
    spec: ModelSpec, mesh: Mesh, dispatch: DispatchName, step: int
) -> tuple[float, float]:
    """-> (tokens that arrive at a rank, (token, expert) rows there), at uniform routing."""
    top_k = spec.num_experts_per_tok
    if dispatch == "gather":
        step *= mesh.size("gather")
    if dispatch != "all_to_all":
        return step, step * top_k
    own = step / mesh.size("slice")
    moe = MoE(spec.hidden_size, top_k, spec.num_local_experts, ITEM_BYTES[spec.dtype])
    return own * ranks_reached(moe, mesh.ep), own * top_k
