"""The plan: everything about a run that can be decided before it starts, as plain data. No torch, no ray.

`temper.plan` is also a function of the Python API. Python puts an imported package in the place of whatever had its
name, so this package can be called as the function whose place it takes.
"""

from __future__ import annotations

import sys
from types import ModuleType

import temper


class _PlanPackage(ModuleType):
    __call__ = staticmethod(temper.plan)


sys.modules[__name__].__class__ = _PlanPackage
