"""DeepSpeed's loss scaler, made to count right and never to raise.

A dynamic scale is halved and the step skipped where a gradient overflows, and doubled after a window of clean steps
(Micikevicius et al. 2018, section 3.2). The arithmetic is `deepspeed.runtime.fp16.loss_scaler`; two things are not as
they should be there, and :func:`mend_scaler` mends them on one optimizer.
"""

from __future__ import annotations

from typing import Any


def mend_scaler(optimizer: Any) -> None:
    """For a ZeRO optimizer of DeepSpeed, any stage, in fp16.

    - It doubles the scale *before* it divides the gradients by it, so that the step in which the scale grows is made
      with half the gradient. Here the scale grows after that step.
    - At the minimum scale it raises in the middle of a step. Here the step is skipped as any other, and
      :func:`is_exhausted` tells.
    """
    scaler, step = optimizer.loss_scaler, optimizer.step
    scaler.raise_error_at_min_scale = False

    def shrink(has_overflow: bool = False) -> None:
        if has_overflow:
            scaler.update_scale(True)

    def step_and_grow(*args: Any, **kwargs: Any) -> Any:
        result = step(*args, **kwargs)
        if not optimizer.overflow:
            scaler.update_scale(False)
        return result

    optimizer._update_scale = shrink
    optimizer.step = step_and_grow


def is_exhausted(scaler: Any) -> bool:
    """Whether an overflow now finds the scale at its minimum and the hysteresis used up: where DeepSpeed raises.

    A static scale has no minimum."""
    if not scaler.dynamic:
        return False
    return scaler.cur_scale <= scaler.min_scale and (scaler.delayed_shift == 1 or scaler.cur_hysteresis == 1)
