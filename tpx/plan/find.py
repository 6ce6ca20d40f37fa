"""Where plans lie: a path as given, or a shipped plan by its name."""

from __future__ import annotations

from pathlib import Path

from ..errors import PlanError, did_you_mean
from .load import load_plan
from .types import Plan


def plan_folder() -> Path:
    """The shipped plans: beside the package in a wheel, else in the repository."""
    here = Path(__file__).resolve().parents[1]
    folder = next((f for f in (here / "plans", here.parent / "plans") if f.is_dir()), None)
    assert folder is not None, f"no plans beside {here}: the installation is incomplete"
    return folder


def shipped_plans(model_type: str) -> dict[str, Path]:
    """The shipped plans of a model family by name."""
    return {path.stem: path for path in sorted((plan_folder() / model_type).glob("*.yaml"))}


def find_plan(tp_plan: str, model_type: str) -> Path:
    """The file of a plan: `tp_plan` is a path if it ends in .yaml or .yml, else a shipped name."""
    shipped = shipped_plans(model_type)
    if tp_plan.endswith((".yaml", ".yml")):
        path = Path(tp_plan).expanduser()
        if not path.is_file():
            raise PlanError(
                f"plan file `{tp_plan}` does not exist",
                "give a path to a file, or a shipped plan's name: "
                + did_you_mean(path.stem, shipped),
                code="P412",
            )
        return path
    if tp_plan not in shipped:
        raise PlanError(
            f"there is no plan `{tp_plan}` for `{model_type}`",
            did_you_mean(tp_plan, shipped) + " (the name of a file ends in `.yaml`)",
            code="P412",
        )
    return shipped[tp_plan]


def read_plan(tp_plan: str, model_type: str) -> Plan:
    """find_plan and load_plan; messages call a shipped plan `plans/<family>/<name>.yaml`."""
    path = find_plan(tp_plan, model_type)
    shipped = not tp_plan.endswith((".yaml", ".yml"))
    return load_plan(path, f"plans/{model_type}/{path.name}" if shipped else tp_plan)


def plans_for_world(model_type: str, world: int) -> list[str]:
    """Names of the shipped plans for that many ranks."""
    return [
        name
        for name, path in shipped_plans(model_type).items()
        if load_plan(path).mesh.world == world
    ]
