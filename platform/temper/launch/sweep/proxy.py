"""Ray Tune's side of a trial: an actor without a CPU that asks the coordinator for the trial's next result.

Ray Tune reuses these actors, so that a trial starts no process; it also makes some that never take a step, and tells
none that its trial has ended (:class:`temper.launch.sweep.tuning.Ends` hears of that). What a trial has computed lies
in the phase store; its checkpoint for Ray Tune is therefore only who it is: `{"params", "phases_done"}`.
"""

from __future__ import annotations

import uuid
from typing import Any

import ray
from ray import tune

from temper.config.space import Params, SpaceConfig
from temper.launch.search import decode, decode_all

STATUS = "trial_status"
"""In a trial's last result: `finished`, or why there is no better one."""


class TrialProxy(tune.Trainable):
    def setup(self, config: dict[str, Any], coordinator: Any = None, space: SpaceConfig | None = None) -> None:
        self._coordinator, self._space = coordinator, space
        self._take(config)

    def _take(self, config: dict[str, Any]) -> None:
        assert self._space is not None, "the driver gives it"
        # Also those whose `when` is not met: a fork may meet it.
        self._wanted: Params = decode_all(self._space, config)
        self._params: Params = decode(self._space, config)
        self._begun, self._is_fork = "", False
        self._number = self._after_step = 0
        self._last: dict[str, Any] = {}

    def step(self) -> dict[str, Any]:
        if not self._begun:
            # Only now: a checkpoint may have been loaded since, and the trial is then another one.
            self._begun, self._begun_as = uuid.uuid4().hex, self.trial_id
            self._ask("begin", self._params, self._after_step, self._is_fork)
        while (answer := self._ask("next_result", self._number)).kind == "wait":
            pass
        if answer.kind == "over":
            return {**self._last, "done": True, STATUS: answer.status}
        self._number += 1
        self._last = answer.result
        return {**self._last, STATUS: "finished" if self._last["done"] else "running"}

    def save_checkpoint(self, checkpoint_dir: str) -> dict[str, Any]:
        return {
            "params": self._params,
            "phases_done": self._last.get("phases_done", 0),
            "step": self._last.get("step", self._after_step),
        }

    def load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Goes on with the trial that the checkpoint is of or, with other values of its own, from its phases."""
        source, self._after_step = checkpoint["params"], checkpoint["step"]
        if source != self._params:
            forked = self._coordinator.fork.remote(source, self._wanted, checkpoint["phases_done"])
            self._params, self._is_fork = ray.get(forked), True

    def reset_config(self, new_config: dict[str, Any]) -> bool:
        self.cleanup()
        self._take(new_config)
        return True

    def cleanup(self) -> None:
        """The trial that was here has ended, or is paused."""
        if self._begun:
            self._ask("pause")
            self._begun = ""

    def _ask(self, method: str, *arguments: Any) -> Any:
        # By the name with which it began: Ray Tune gives the actor the next trial's before it tells so.
        return ray.get(getattr(self._coordinator, method).remote(self._begun_as, self._begun, *arguments))
