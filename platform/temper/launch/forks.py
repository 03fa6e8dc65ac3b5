"""Population-based training by phase: what a trial is that goes on from another one's phases with values of its own."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from temper.config.space import Params, SpaceConfig
from temper.config.space_load import active_params, dependency_order


def fork_params(
    space: SpaceConfig, source: Params, wanted: Params, phases_of: Callable[[Params], Sequence[str]], done: int
) -> Params:
    """The params of a clone of `source`, whose first `done` phases are done: what is `wanted`, as far as it leaves
    those phases as they are, and the source's for the rest. So the clone is an ordinary job, whose first phases are in
    the store.

    `wanted` has values for all variables, `phases_of` gives the fingerprints of a trial's phases.
    """
    reused = list(phases_of(source)[:done])
    values, params = {**wanted, **source}, source
    for name in dependency_order(space):
        tried = active_params(space, {**values, name: wanted[name]})
        if tried == params or list(phases_of(tried)[:done]) == reused:
            values, params = {**values, name: wanted[name]}, tried
    return params
