"""Whether a plan computes what one rank computes: resolved with proofs off, run on real ranks.

Imported in ranks: nothing slow here.
"""

from __future__ import annotations

import pickle
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from paged import Pages
from ranks import ranks
from torch import distributed

from tpx.batch import FULL, SLIDING
from tpx.comm import Groups
from tpx.config import read_config
from tpx.errors import PlanError
from tpx.families import family_of
from tpx.families.family import Family
from tpx.families.layout import Layout
from tpx.families.spec import ModelSpec
from tpx.index import CheckpointIndex
from tpx.mesh import Mesh
from tpx.models.load import load_model
from tpx.plan.resolve import resolve
from tpx.plan.types import Plan, RankPlan, Rule

LIMIT = 10.0  # seconds until a run counts as one that never ends
TOLERANCE = 1e-4
# Sequences of the dp groups: longer than the window, one token, none.
PROMPTS: list[list[list[int]]] = [
    [[11, 5, 9, 120, 7, 3, 2, 64, 65, 66, 67, 130], [4]],
    [[8, 99, 1]],
    [],
    [[21, 22, 23, 24]],
]
STEPS: list[list[list[int]]] = [[[17], [18]], [[19]], [], [[20]]]


class Model(NamedTuple):
    folder: Path
    family: Family
    spec: ModelSpec
    layout: Layout
    index: CheckpointIndex


class Ran(NamedTuple):
    """Of one rank: logits of a prefill and a decode step, and the parameters that it holds."""

    logits: list[np.ndarray]
    held: dict[str, np.ndarray]


def open_model(folder: Path) -> Model:
    config = read_config(folder)
    family = family_of(config)
    spec = family.spec(config)
    return Model(folder, family, spec, family.layout(spec), CheckpointIndex.open(folder))


class Loaded(NamedTuple):
    """What load_model asks of a prepared plan."""

    spec: ModelSpec
    folder: Path
    index: CheckpointIndex


def attempt(model: Loaded, plans: list[RankPlan]) -> Ran | str:
    """Runs on every rank. A string: what went wrong before the first collective, on any rank."""
    rank = distributed.get_rank()
    failed, groups, module = "", None, None
    try:
        groups = Groups(plans[rank].mesh, rank, torch.device("cpu"))
        with torch.inference_mode():
            module, _ = load_model(
                model, plans[rank], groups, torch.float32, torch.device("cpu")  # type: ignore[arg-type]
            )  # fmt: skip
    except Exception as error:
        failed = f"{type(error).__name__}: {error}"
    told: list[Any] = [None] * len(plans)
    distributed.all_gather_object(told, failed)
    if any(told):
        if groups is not None:
            groups.close()
        return next(text for text in told if text)
    assert groups is not None
    assert module is not None
    mesh = plans[rank].mesh
    logits = forward(module, model.spec, plans[rank], mesh.coords(rank).dp, mesh.dp)
    held = {name: _plain(p) for name, p in module.named_parameters(remove_duplicate=False)}
    groups.close()
    return Ran(logits, held)


@torch.inference_mode()
def forward(module: Any, spec: ModelSpec, plan: RankPlan, dp: int, groups: int) -> list[np.ndarray]:
    """Logits of all tokens of a prefill and a decode step of one dp group."""
    kinds = [FULL if kind == "full_attention" else SLIDING for kind in spec.layer_types]
    pages = Pages(kinds, plan.cuts["KV"].size, spec.head_dim, spec.sliding_window)
    found = []
    for tokens in (PROMPTS, STEPS):
        longest = max(sum(map(len, sequences)) for sequences in tokens[:groups])
        batch = pages.step(tokens[dp])._replace(longest=longest, decode=tokens is STEPS)
        found.append(module(batch, pages.caches).numpy())
    return found


def _plain(parameter: torch.Tensor) -> np.ndarray:
    return parameter.detach().numpy()


class Oracle:
    """Runs plans on the checkpoint in `folder`, equal ones once."""

    def __init__(self, folder: Path):
        from safetensors.torch import load_file

        self.model = open_model(folder)
        self.file = {
            name: (t if t.dtype == torch.uint8 else t.float()).numpy()
            for path in sorted(folder.glob("*.safetensors"))
            for name, t in load_file(path).items()
        }
        self.runs = 0
        self._known: dict[bytes, tuple[str, str]] = {}
        self._one_rank: list[list[np.ndarray]] = []

    def run(self, plan: Plan) -> tuple[str, str]:
        """-> (right, wrong or no meaning; why)."""
        try:
            plans = self._resolved(plan)
        except PlanError as error:
            return "no meaning", error.message
        except (AssertionError, ArithmeticError, LookupError) as error:
            return "wrong", f"cannot be resolved: {type(error).__name__}: {error}"
        key = pickle.dumps([_bare(each) for each in plans])
        if key not in self._known:
            self.runs += 1
            self._known[key] = self._run(plans)
        return self._known[key]

    def _resolved(self, plan: Plan) -> list[RankPlan]:
        m = self.model
        return [
            resolve(plan, m.spec, m.layout, m.index, rank, prove=False)
            for rank in range(plan.mesh.world)
        ]

    def _run(self, plans: list[RankPlan]) -> tuple[str, str]:
        loaded = Loaded(self.model.spec, self.model.folder, self.model.index)
        try:
            found = ranks(len(plans)).run(attempt, loaded, plans, limit=LIMIT)
        except AssertionError as error:
            return "wrong", _cause(str(error))
        refused = next((one for one in found if isinstance(one, str)), None)
        if refused is not None:
            return "wrong", refused.splitlines()[0]
        fault = self._compare(plans, found) or self._gathered(plans, found)
        return ("wrong", fault) if fault else ("right", "")

    def _compare(self, plans: list[RankPlan], found: list[Ran]) -> str | None:
        for rank, (plan, ran) in enumerate(zip(plans, found, strict=True)):
            expected = self.expected(plan.mesh.coords(rank).dp)
            for ours, theirs in zip(ran.logits, expected, strict=True):
                if ours.shape != theirs.shape:
                    return f"logits of shape {ours.shape}, not {theirs.shape}"
                apart = float(np.abs(ours - theirs).max(initial=0.0))
                if not apart <= TOLERANCE:
                    return f"logits differ by {apart:.2g}"
        return None

    def expected(self, dp: int) -> list[np.ndarray]:
        """One rank's logits for the sequences of a dp group."""
        if not self._one_rank:
            rules = tuple(Rule(name, "replicate", 0) for name in self.model.layout.parameters)
            (plan,) = self._resolved(Plan("one rank", self.model.spec.model_type, Mesh(), rules))
            loaded = Loaded(self.model.spec, self.model.folder, self.model.index)
            cpu = torch.device("cpu")
            module, _ = load_model(loaded, plan, Groups.alone(cpu), torch.float32, cpu)  # type: ignore[arg-type]
            self._one_rank = [
                forward(module, self.model.spec, plan, i, len(PROMPTS)) for i in range(len(PROMPTS))
            ]
        return self._one_rank[dp]

    def _gathered(self, plans: list[RankPlan], found: list[Ran]) -> str | None:
        """All shards put where their ranges say make the file again."""
        for name, parameter in self.model.layout.parameters.items():
            whole = self.file[parameter.sources[0].tensor]
            times = np.zeros(whole.shape, np.int32)
            for plan, ran in zip(plans, found, strict=True):
                ranges = plan.shards[name].ranges
                place = np.ix_(*(np.concatenate([np.arange(*r) for r in held]) for held in ranges))
                if ran.held[name].shape != whole[place].shape:
                    return f"`{name}` is held in shape {ran.held[name].shape}"
                if not np.array_equal(ran.held[name], whole[place]):
                    return f"`{name}` differs from the file"
                times[place] += 1
            if times.min() == 0:
                return f"`{name}` cannot be gathered: {int((times == 0).sum())} elements are gone"
        return None


def _bare(plan: RankPlan) -> RankPlan:
    """Without what does not change the run: styles and lines."""
    shards = {name: replace(s, style="", line=0) for name, s in plan.shards.items()}
    return replace(plan, shards=shards)


def _cause(report: str) -> str:
    """The last line of the first traceback, or that there was no end."""
    lines = [line for line in report.splitlines() if line and not line.startswith(" ")]
    first = next((line for line in lines if "Error" in line), "")
    return first or lines[0]
