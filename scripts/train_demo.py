"""Trains the demo checkpoint of examples/models/: a small gpt-oss on Python's documentation.

    sudo apt-get install python3.11-doc python-django-doc ...      # see SUBJECT and OTHERS
    python scripts/train_demo.py prepare --out .demo               # text -> tokenizer, token ids
    python scripts/train_demo.py train --data .demo --out MODEL    # minutes on a GPU

On a CPU `train --steps 6 --batch 2 --shrink` shows in a minute that all of it works.
"""

from __future__ import annotations

import argparse
import math
import shutil
import sys
import time
from pathlib import Path

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from checkpoint_files import Config, stored_config, write_json, write_tensors
from demo_model import DemoModel, Muon, straight_through
from demo_text import documents
from demo_tokens import (
    END_ID,
    RETURN_ID,
    byte_lengths,
    encoded,
    held_out,
    rendered,
    train_tokenizer,
    write_tokenizer,
)
from make_checkpoint import demo_config

DOC = Path("/usr/share/doc")
SUBJECT = DOC / "python3.11/html"  # what the model is to write, and the only text held out
# Debian's python-NAME-doc: more of the same kind of English.
OTHERS = "aiohttp astropy attr celery click dask discord distributed django ezdxf flask fluids"
OTHERS += " ipython jinja2 nibabel pandas psutil pyparsing pytest qutip rdflib requests"
OTHERS += " scipy setuptools sqlalchemy statsmodels sympy taskflow tornado traitlets werkzeug"
OTHERS += " xarray"
ELSEWHERE = "fonttools", "python3-silx"  # where python-fonttools-doc and python-silx-doc put theirs


def prepare(args: argparse.Namespace) -> None:
    """Writes OUT/tokens.npz and the tokenizer's files."""
    for folder in (args.subject, *args.others):
        assert folder.is_dir(), f"{folder} is absent: install its Debian package, or name another"
    subject = list(documents(args.subject, chat=True))
    others = [one for folder in args.others for one in documents(folder, chat=False)]
    taught = [rendered(one) for one in subject if not held_out(one)]
    parts = {
        "subject": taught,
        "others": [rendered(one) for one in others],
        "held_out": [rendered(one) for one in subject if held_out(one) and one.kind == "page"],
    }
    print({name: f"{len(t)} documents, {sum(map(len, t)):,} chars" for name, t in parts.items()})
    config = demo_config()
    tokenizer = train_tokenizer(taught + parts["others"][::4], config["vocab_size"])
    args.out.mkdir(parents=True, exist_ok=True)
    write_tokenizer(tokenizer, args.out, config["max_position_embeddings"])
    arrays: dict[str, np.ndarray] = {}
    for name, texts in parts.items():
        arrays[name], arrays[f"{name}_starts"] = encoded(tokenizer, texts)
        count = len(arrays[name])
        print(f"{name}: {count:,} tokens of {sum(map(len, texts)) / count:.2f} characters")
    lengths = byte_lengths(tokenizer)
    np.savez_compressed(args.out / "tokens.npz", byte_lengths=lengths, **arrays)


class Windows:
    """Random windows of the text, half of them from a document's beginning."""

    def __init__(self, data: dict[str, np.ndarray], length: int, device: str):
        self.length, self.device = length, device
        self.parts = {
            name: (
                torch.from_numpy(data[name].astype(np.int32)).to(device),
                torch.from_numpy(data[f"{name}_starts"]).to(device),
            )
            for name in ("subject", "others")
        }

    def draw(self, batch: int, share: float) -> Tensor:
        """[batch, length + 1] ids, this share of them from the subject."""
        mine = round(batch * share)
        return torch.cat([self.some("subject", mine), self.some("others", batch - mine)])

    def some(self, name: str, count: int) -> Tensor:
        ids, starts = self.parts[name]
        last = len(ids) - self.length - 1
        anywhere = torch.randint(last, (count,), device=self.device)
        begin = starts[torch.randint(len(starts), (count,), device=self.device)].clamp(max=last)
        at = torch.where(torch.arange(count, device=self.device) % 2 == 0, anywhere, begin)
        return ids[at[:, None] + torch.arange(self.length + 1, device=self.device)].long()


@torch.no_grad()
def bits_a_byte(
    model: DemoModel, ids: Tensor, byte_lengths: Tensor, experts: list[Tensor]
) -> float:
    """Of ids [N, S + 1]: windows that each start from nothing, every target counted once."""
    bits, size = 0.0, 0
    for window in ids.split(16):
        logits, _ = model(window[:, :-1], *experts)
        targets = window[:, 1:]
        loss = F.cross_entropy(logits.float().flatten(0, 1), targets.flatten(), reduction="sum")
        bits += loss.item() / math.log(2)
        size += int(byte_lengths[targets].sum())
    return bits / size


def held_out_windows(data: dict[str, np.ndarray], length: int, device: str) -> Tensor:
    ids = torch.from_numpy(data["held_out"].astype(np.int64))
    return ids[: len(ids) // (length + 1) * (length + 1)].view(-1, length + 1).to(device)


def optimizers(model: DemoModel, peak: float) -> list[torch.optim.Optimizer]:
    """Muon for stacks of matrices; AdamW for embedding, head, router, norms, biases and sinks."""
    hidden = [model.gate_up_proj, model.down_proj]
    hidden += [weight for weight in model.attention.values() if weight.ndim == 3]
    chosen = {id(weight) for weight in hidden}
    others = [weight for weight in model.parameters() if id(weight) not in chosen]
    adam = torch.optim.AdamW(others, lr=peak, betas=(0.9, 0.95), weight_decay=0.0)
    made = [Muon(hidden, lr=peak, decay=0.1), adam]
    for group in (group for one in made for group in one.param_groups):
        group["peak"] = group["lr"]
    return made


def schedule(progress: float) -> float:
    """Share of the peak rate: 1% warm-up, level until half, then a line to nothing."""
    return min(1.0, progress / 0.01 + 0.02, 2 * (1 - progress))


def experts_of(model: DemoModel, packed: bool) -> list[Tensor]:
    """Their two stacks, never as parameters, so that one compiled graph serves both."""
    weights = [model.gate_up_proj, model.down_proj]
    return [straight_through(one) if packed else one.view_as(one) for one in weights]


class Trainer:
    """The loop; from `packed_from` on it runs with experts as MXFP4 keeps them."""

    def __init__(self, model: DemoModel, data: dict[str, np.ndarray], args: argparse.Namespace):
        self.model, self.args = model, args
        self.device = str(model.embed.device)
        length = model.config["max_position_embeddings"]
        self.windows = Windows(data, length, self.device)
        self.held_out = held_out_windows(data, length, self.device)[: 16 if args.shrink else None]
        self.byte_lengths = torch.from_numpy(data["byte_lengths"]).to(self.device)
        self.optimizers = optimizers(model, args.rate)
        self.losses = torch.compile(self.loss) if self.device != "cpu" else self.loss
        self.best: tuple[float, dict[str, Tensor]] = (math.inf, {})

    def autocast(self) -> torch.autocast:
        kind = self.device.split(":")[0]
        return torch.autocast(kind, dtype=torch.bfloat16, enabled=kind != "cpu")

    def loss(self, ids: Tensor, *experts: Tensor) -> tuple[Tensor, Tensor]:
        logits, balance = self.model(ids[:, :-1], *experts)
        return F.cross_entropy(logits.float().flatten(0, 1), ids[:, 1:].flatten()), balance

    def step(self, progress: float, packed: bool) -> Tensor:
        self.model.train()
        ids = self.windows.draw(self.args.batch, 0.2 + 0.4 * progress)
        with self.autocast():
            loss, balance = self.losses(ids, *experts_of(self.model, packed))
        (loss + 0.01 * balance).backward()
        torch.nn.utils.clip_grad_norm_(self.model.parameters(), 1.0)
        for one in self.optimizers:
            for group in one.param_groups:
                group["lr"] = group["peak"] * schedule(progress)
            one.step()
            one.zero_grad(set_to_none=True)
        return torch.stack([loss.detach(), balance.detach()])

    def held_out_bits(self, packed: bool) -> float:
        self.model.eval()
        with self.autocast(), torch.no_grad():
            experts = experts_of(self.model, packed)
            return bits_a_byte(self.model, self.held_out, self.byte_lengths, experts)

    def run(self) -> None:
        start, every = time.perf_counter(), max(1, self.args.steps // 16)
        for step in range(self.args.steps):
            packed = step >= min(self.args.steps * self.args.packed_from, self.args.steps - 1)
            seen = self.step(step / self.args.steps, packed)
            if step % every and step != self.args.steps - 1:
                continue
            bits = self.held_out_bits(packed)
            if packed and bits < self.best[0]:
                state = self.model.state_dict()
                self.best = bits, {name: value.clone() for name, value in state.items()}
            loss, balance = seen.tolist()
            line = (
                f"step {step:5}  loss {loss:.3f}  balance {balance:.3f}  held-out {bits:.4f} bits"
            )
            mode = "  packed" if packed else ""
            print(f"{line}{mode}  {time.perf_counter() - start:.0f} s", flush=True)
        self.model.load_state_dict(self.best[1])


def small(config: Config) -> Config:
    """For a look on a CPU: two layers and four experts."""
    kinds = config["layer_types"][:2]
    return config | {"num_hidden_layers": 2, "num_local_experts": 4, "layer_types": kinds}


def train(args: argparse.Namespace) -> None:
    """Trains on DATA/tokens.npz and writes the checkpoint, with the tokenizer's files, to OUT."""
    torch.manual_seed(args.seed)
    data = dict(np.load(args.data / "tokens.npz"))
    config = small(demo_config()) if args.shrink else demo_config()
    model = DemoModel(config, config["max_position_embeddings"]).to(args.device)
    print(f"{sum(p.numel() for p in model.parameters()):,} parameters on {args.device}")
    trainer = Trainer(model, data, args)
    start = time.perf_counter()
    trainer.run()
    seconds = time.perf_counter() - start
    bits = {"before": trainer.held_out_bits(False), "after": trainer.held_out_bits(True)}
    print(
        f"held-out bits a byte: {bits['before']:.4f} before quantisation, {bits['after']:.4f} after"
    )
    tokens = args.steps * args.batch * config["max_position_embeddings"]
    print(f"{tokens:,} tokens in {seconds:.0f} s: {tokens / seconds:,.0f} a second")
    write_tensors(args.out, stored_config(config), model.checkpoint(), shards=2)
    generation = {"do_sample": True, "eos_token_id": [RETURN_ID, END_ID], "pad_token_id": END_ID}
    write_json(
        args.out / "generation_config.json", generation | {"temperature": 0.7, "top_p": 0.95}
    )
    for name in ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja"):
        shutil.copy(args.data / name, args.out / name)
    print(f"{args.out}: {sum(file.stat().st_size for file in args.out.iterdir()):,} bytes")


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description="Train the demo checkpoint")
    commands = parser.add_subparsers(required=True)
    text = commands.add_parser("prepare", help="documentation -> tokenizer and token ids")
    text.set_defaults(run=prepare)
    text.add_argument("--subject", type=Path, default=SUBJECT)
    others = [DOC / f"python-{name}-doc" for name in OTHERS.split()]
    others += [DOC / name for name in ELSEWHERE]
    text.add_argument("--others", type=Path, nargs="*", default=others)
    text.add_argument("--out", type=Path, default=Path(".demo"))
    model = commands.add_parser("train", help="token ids -> checkpoint")
    model.set_defaults(run=train)
    model.add_argument("--data", type=Path, default=Path(".demo"))
    model.add_argument("--out", type=Path, required=True)
    model.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    model.add_argument("--steps", type=int, default=2400)
    model.add_argument("--batch", type=int, default=64, help="windows of 512 tokens a step")
    model.add_argument("--rate", type=float, default=6e-3, help="peak learning rate")
    model.add_argument("--packed-from", type=float, default=0.7, help="share of steps before MXFP4")
    model.add_argument("--seed", type=int, default=0)
    model.add_argument("--shrink", action="store_true", help="2 layers and 4 experts")
    return parser.parse_args()


def main() -> None:
    args = arguments()
    args.run(args)


if __name__ == "__main__":
    main()
