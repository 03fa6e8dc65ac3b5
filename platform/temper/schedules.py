"""Schedules as pure functions of the step, so that a checkpoint stores one integer and nothing else.

A step is counted from 0: `factor(0)` is what the first optimizer step of a phase multiplies its learning rate by.
"""

from __future__ import annotations

import math
from collections.abc import Callable

from temper.config.schema import RampConfig, ScheduleConfig

Schedule = Callable[[int], float]


def build_schedule(config: ScheduleConfig, steps: int) -> Schedule:
    """The factor of the learning rate at each step of a phase of `steps`: warm-up first, then the decay.

    Warm-up rises linearly, (step + 1) / (warmup_steps + 1): no step is spent at a learning rate of zero, and step
    `warmup_steps` is the first at the full one. `cosine` (Loshchilov and Hutter 2017, without restarts) and `linear`
    fall from there to `final_factor`, which they reach with the end of the phase. `step` multiplies by `gamma` at
    each milestone. Steps beyond the phase keep the value at its end.
    """
    decay = _DECAYS[config.kind](config, steps)
    warmup = config.warmup_steps

    def factor(step: int) -> float:
        if step < warmup:
            return (step + 1) / (warmup + 1)
        return decay(step)

    return factor


def build_ramp(value: float | RampConfig, steps: int) -> Schedule:
    """The value at each of `steps` steps: the same at all of them, or from `start`, at the first, to `end`, at the last
    and at every later one, by a line or by half a period of a cosine. Of a single step it is `start`."""
    if not isinstance(value, RampConfig):
        return lambda step: value
    share = _SHARES[value.kind]

    def ramp(step: int) -> float:
        risen = share(min(step / max(steps - 1, 1), 1.0))
        return (1.0 - risen) * value.start + risen * value.end

    return ramp


_SHARES: dict[str, Callable[[float], float]] = {
    "linear": lambda progress: progress,
    "cosine": lambda progress: 0.5 * (1.0 - math.cos(math.pi * progress)),
}


def _constant(config: ScheduleConfig, steps: int) -> Schedule:
    return lambda step: 1.0


def _cosine(config: ScheduleConfig, steps: int) -> Schedule:
    progress = _progress(config.warmup_steps, steps)
    final = config.final_factor
    return lambda step: final + (1.0 - final) * 0.5 * (1.0 + math.cos(math.pi * progress(step)))


def _linear(config: ScheduleConfig, steps: int) -> Schedule:
    progress = _progress(config.warmup_steps, steps)
    final = config.final_factor
    return lambda step: 1.0 - (1.0 - final) * progress(step)


def _step(config: ScheduleConfig, steps: int) -> Schedule:
    # Rounded, so that 0.7 of 10 steps is step 7 whatever the product's last bit is.
    boundaries = [round(milestone * steps) for milestone in config.milestones]
    return lambda step: config.gamma ** sum(step >= boundary for boundary in boundaries)


def _progress(warmup: int, steps: int) -> Callable[[int], float]:
    """Share of the decay that is behind `step`: 0 at the end of the warm-up, 1 from the end of the budget on."""
    length = max(steps - warmup, 1)
    return lambda step: min(max((step - warmup) / length, 0.0), 1.0)


_DECAYS: dict[str, Callable[[ScheduleConfig, int], Schedule]] = {
    "constant": _constant,
    "cosine": _cosine,
    "linear": _linear,
    "step": _step,
}
