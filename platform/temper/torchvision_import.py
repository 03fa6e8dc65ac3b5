"""Makes `import torchvision` work on a CPU-only torch; to be called before torchvision or torchmetrics is imported.

PyPI's torchvision is built against a CUDA torch. Beside a CPU-only one its compiled operators do not load, and the
import then fails on the two operators that torchvision describes to the compiler. Declaring their schemas is enough:
no model or transform that temper uses calls them.
"""

from __future__ import annotations

from importlib.util import find_spec
from pathlib import Path

import torch

_NMS_SCHEMA = "(Tensor dets, Tensor scores, float iou_threshold) -> Tensor"


def declare_torchvision_operators() -> None:
    """Load torchvision's compiled operators or, where they do not load, declare the two that its import needs."""
    if _is_registered("nms") or _load_operators():
        return
    for name in ("nms", "qnms"):
        if not _is_registered(name):
            torch.library.define(f"torchvision::{name}", _NMS_SCHEMA)


def _is_registered(name: str) -> bool:
    return hasattr(torch.ops.torchvision, name)


def _load_operators() -> bool:
    # Tried first, because declaring an operator that the library then registers itself is an error. Loading it twice
    # is not: torchvision's own import finds it loaded.
    spec = find_spec("torchvision")
    if spec is None or spec.origin is None:
        return False
    for library in sorted(Path(spec.origin).parent.glob("_C.*")):
        try:
            torch.ops.load_library(str(library))
        except (ImportError, OSError):
            continue
        return True
    return False
