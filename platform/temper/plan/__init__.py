"""The plan: everything about a run that can be decided before it starts, as plain data. No torch, no ray.

`temper.plan` is also a function of the Python API. Python puts an imported package in the place of whatever had its
name, so this package can be called as that function.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path
from types import ModuleType
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from temper.config.schema import JobConfig
    from temper.plan.build import Plan


def plan_job(job: str | Path | JobConfig, overrides: Sequence[str] = ()) -> Plan:
    """The plan of a job file or a loaded job on this machine; see :func:`temper.plan`."""
    from temper.config.load import resolve_job
    from temper.plan.build import build_plan
    from temper.plan.mesh import local_cluster

    resolved, folder = resolve_job(job, overrides)
    return build_plan(resolved, local_cluster(), folder)


class _PlanPackage(ModuleType):
    __call__ = staticmethod(plan_job)


sys.modules[__name__].__class__ = _PlanPackage
