"""What transformers says of the same edits, for a plan that it can express: tp2-ep2.

    python scripts/mutants_transformers.py            # writes the table into docs/plans.md
    python scripts/mutants_transformers.py --dry-run

Each edit is made in DistributedConfig's dicts and run on two gloo ranks against one process: the
logits to 1e-4, and each parameter gathered against the file. Not a gate: a comparison. Needs
accelerate, which nothing else here does (`pip install accelerate`).
"""

from __future__ import annotations

import argparse
import sys
import tempfile
import warnings
from pathlib import Path
from typing import Any, NamedTuple

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "tests")]

import torch  # noqa: E402
from make_checkpoint import make_checkpoint  # noqa: E402
from mutants import CHECKPOINTS, checker, make  # noqa: E402
from oracle import open_model  # noqa: E402
from ranks import ranks  # noqa: E402

from tpx.plan.find import shipped_plans  # noqa: E402

PAGE = ROOT / "docs" / "plans.md"
BEGIN, END = "<!-- transformers: begin -->\n", "<!-- transformers: end -->\n"
IDS = [11, 5, 9, 120, 7, 3, 2, 64, 65, 66, 67, 130]
A = "model.layers.*.self_attn"
TP = {f"{A}.{name}_proj": "colwise" for name in "qkv"} | {
    f"{A}.o_proj": "rowwise",
    f"{A}.sinks": "colwise",
    A: "local_params",  # without it their forward mixes tensors and DTensors
    "model.embed_tokens": "embedding_rowwise",
    "lm_head": "colwise_gather_output",
}
E = "model.layers.*.mlp.experts"


class Edit(NamedTuple):
    """ours: text of tp2-ep2.yaml and what replaces it. theirs: rules changed; None: dropped."""

    what: str
    ours: tuple[str, str] | None
    theirs: dict[str, str | None]
    experts: dict[str, str] | None = None


def rule(pattern: str, style: str, to: str) -> tuple[str, str]:
    """A rule of the shipped plan and the line that replaces it."""
    text = shipped_plans("gpt_oss")["tp2-ep2"].read_text()
    line = next(line for line in text.splitlines() if line.startswith(f"  {pattern}:"))
    assert line.endswith(style), f"{line=} {style=}"
    return line, f"  {pattern}: {to}" if to else ""


QKV = "model.layers.*.self_attn.{q,k,v}_proj"
OUT, SINKS, EMBED = f"{A}.o_proj", f"{A}.sinks", "model.embed_tokens"
NORM, ROUTER = "model.norm", "model.layers.*.mlp.router"


def all_of(style: str | None) -> dict[str, str | None]:
    return {f"{A}.{name}_proj": style for name in "qkv"}


EDITS = [
    Edit("none", None, {}),
    Edit("o_proj: rowwise -> colwise", rule(OUT, "rowwise", "colwise"), {OUT: "colwise"}),
    Edit("o_proj: rowwise -> replicate", rule(OUT, "rowwise", "replicate"), {OUT: "replicate"}),
    Edit("o_proj: dropped", rule(OUT, "rowwise", ""), {OUT: None}),
    Edit("q, k, v: colwise -> rowwise", rule(QKV, "colwise", "rowwise"), all_of("rowwise")),
    Edit("q, k, v: colwise -> replicate", rule(QKV, "colwise", "replicate"), all_of("replicate")),
    Edit("q, k, v: dropped", rule(QKV, "colwise", ""), all_of(None)),
    Edit("sinks: colwise -> replicate", rule(SINKS, "colwise", "replicate"), {SINKS: "replicate"}),
    Edit("sinks: colwise -> rowwise", rule(SINKS, "colwise", "rowwise"), {SINKS: "rowwise"}),
    Edit("sinks: dropped", rule(SINKS, "colwise", ""), {SINKS: None}),
    Edit("embed_tokens: vocab -> colwise", rule(EMBED, "vocab", "colwise"), {EMBED: "colwise"}),
    Edit("embed_tokens: vocab -> rowwise", rule(EMBED, "vocab", "rowwise"), {EMBED: "rowwise"}),
    Edit("embed_tokens: dropped", rule(EMBED, "vocab", ""), {EMBED: None}),
    Edit("lm_head: vocab -> colwise", rule("lm_head", "vocab", "colwise"), {"lm_head": "colwise"}),
    Edit("lm_head: vocab -> rowwise", rule("lm_head", "vocab", "rowwise"), {"lm_head": "rowwise"}),
    Edit("lm_head: vocab -> replicate", rule("lm_head", "vocab", "replicate"),
         {"lm_head": "replicate"}),
    Edit("norm: replicate -> colwise", rule(NORM, "replicate", "colwise"), {NORM: "colwise"}),
    Edit("norm: replicate -> rowwise", rule(NORM, "replicate", "rowwise"), {NORM: "rowwise"}),
    Edit("norm: replicate -> all_reduce", rule(NORM, "replicate", "all_reduce"),
         {NORM: "all_reduce"}),
    Edit("router: replicate -> colwise", rule(ROUTER, "replicate", "colwise"),
         {ROUTER: "colwise"}),
    Edit("router: replicate -> rowwise", rule(ROUTER, "replicate", "rowwise"),
         {ROUTER: "rowwise"}),
    Edit("experts: expert -> replicate", rule(E, "expert", "replicate"), {},
         {f"{E}{end}": "replicate" for end in
          ("", ".gate_up_proj", ".gate_up_proj_bias", ".down_proj", ".down_proj_bias")}),
    Edit("experts: expert -> colwise", rule(E, "expert", "colwise"), {},
         {f"{E}{end}": "colwise" for end in
          ("", ".gate_up_proj", ".gate_up_proj_bias", ".down_proj", ".down_proj_bias")}),
    Edit("a typo: o_projx", (f"  {OUT}:", f"  {OUT}x:"), {OUT: None, f"{OUT}x": "rowwise"}),
    Edit("a typo: rowwisex", rule(OUT, "rowwise", "rowwisex"), {OUT: "rowwisex"}),
]  # fmt: skip


def load(folder: str, **options: Any) -> Any:
    from transformers import GptOssForCausalLM

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return GptOssForCausalLM.from_pretrained(
            folder, dtype=torch.float32, attn_implementation="eager", **options
        ).eval()


@torch.inference_mode()
def attempt(folder: str, tp_plan: dict[str, str], ep_plan: dict[str, str] | None) -> Any:
    """On each of two ranks: (stage, text) where it fails, else (logits, gathered parameters,
    the share of all elements that lies here)."""
    from torch import distributed
    from transformers.distributed import DistributedConfig

    warnings.simplefilter("ignore")
    stage = "load"
    try:
        options = {"ep_plan": ep_plan} if ep_plan else {}
        config = DistributedConfig(tp_size=2, ep_size=2, tp_plan=tp_plan, **options)
        model = load(folder, distributed_config=config)
        stage = "forward"
        logits = model(torch.tensor([IDS])).logits
        if hasattr(logits, "full_tensor"):
            logits = logits.full_tensor()
        stage = "gather"
        held = {
            name: (p.full_tensor() if hasattr(p, "full_tensor") else p).detach().numpy()
            for name, p in model.named_parameters()
        }
    except Exception as error:
        distributed.barrier()
        return stage, f"{type(error).__name__}: {str(error).strip().splitlines()[0]}"
    distributed.barrier()
    local = sum(getattr(p, "to_local", lambda p=p: p)().numel() for p in model.parameters())
    return logits.numpy(), held, local / sum(p.numel() for p in model.parameters())


def theirs(folder: str, edit: Edit, expected: Any) -> str:
    """What transformers makes of an edit, in a phrase."""
    changed = {key: style for key, style in (TP | edit.theirs).items() if style is not None}
    try:
        found = ranks(2).run(attempt, folder, changed, edit.experts, limit=60.0)
    except AssertionError:
        return "hangs, or a rank dies"
    for one in found:
        if isinstance(one[0], str):
            stage = {"load": "refused", "forward": "crash in forward", "gather": "crash in saving"}
            return f"{stage[one[0]]}: {one[1][:70]}"
    logits, held, share = found[0]
    whole, file = expected
    if logits.shape != whole.shape:
        return f"**accepted, wrong**: logits of shape {list(logits.shape)}"
    apart = float(abs(logits - whole).max())
    if not apart <= 1e-4:
        return f"**accepted, wrong**: logits differ by {apart:.2g}"
    bad = [n for n, p in held.items() if p.shape != file[n].shape or abs(p - file[n]).max() > 0]
    if bad:
        return f"**accepted, wrong**: {len(bad)} parameters"
    return f"accepted, right; {100 * share:.0f}% of the elements on a rank"


def ours(edit: Edit, folder: Path) -> str:
    text = shipped_plans("gpt_oss")["tp2-ep2"].read_text()
    if edit.ours:
        assert text.count(edit.ours[0]) == 1, edit
        text = text.replace(*edit.ours)
    said, reason = checker(text, 2, open_model(folder))
    return said if said == "accepted" else f"{said}, {reason.split()[0]}"


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--dry-run", action="store_true", help="print, and write nothing")
    args = parser.parse_args()
    torch.set_num_threads(1)
    import transformers

    lines = [f"| edit of `tp2-ep2` | tpx | transformers {transformers.__version__} |"]
    lines.append("|---|---|---|")
    with tempfile.TemporaryDirectory() as name:
        folder = make(Path(name) / "packed", "3 blocks")
        described = CHECKPOINTS["3 blocks"]
        plain = make_checkpoint(Path(name) / "plain", described, seed=3, experts="bf16")
        with torch.inference_mode():
            logits = load(str(plain))(torch.tensor([IDS])).logits.numpy()
        file = {n: p.detach().numpy() for n, p in load(str(plain)).named_parameters()}
        for edit in EDITS:
            said = ours(edit, folder), theirs(str(plain), edit, (logits, file))
            lines.append(f"| {edit.what} | {' | '.join(said)} |")
            print(lines[-1], flush=True)
    if not args.dry_run:
        before, _, rest = PAGE.read_text().partition(BEGIN)
        assert rest, f"{PAGE} has no {BEGIN!r}"
        after = rest.partition(END)[2]
        PAGE.write_text(before + BEGIN + "\n".join(lines) + "\n" + END + after)
    return 0


if __name__ == "__main__":
    sys.exit(main())
