"""Builders by model_type: spec, this rank's plan, groups and kernels -> a module to run."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import nn

from ..comm import Groups
from ..families.spec import ModelSpec
from ..ops.kernel import Kernels
from ..plan.types import RankPlan
from . import gpt_oss

Builder = Callable[[ModelSpec, RankPlan, Groups, torch.dtype, Kernels], nn.Module]

BUILDERS: dict[str, Builder] = {"gpt_oss": gpt_oss.build}
