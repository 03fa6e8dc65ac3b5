"""A job's run in MLflow as a tree: below it a run for each of its phases, and on it what it all came to.

A phase's run has the points of its evaluations at the same steps as the job's run, so that a chart of several of them
shows each phase as a series of its own on one axis. One that another run computed is marked, and linked to that run.
Everything is made from the run's folder and the phase store, any number of times, with one result.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from temper.files import read_json
from temper.plan.dsd import parameters_left
from temper.products import computing_run, read_phase, run_name
from temper.run_folder import HISTORY, PHASES, PLAN
from temper.tracking.delivery import take_batch
from temper.tracking.description import origin_tags, phases_tags, safe_params
from temper.tracking.history import Record, parse_record
from temper.tracking.mlflow_store import RunMetrics, RunStatus, build_client, create_run, fetch_run, log_final

if TYPE_CHECKING:
    from mlflow import MlflowClient
    from mlflow.entities import Run

_TAIL_BYTES = 2**17
_POINTS = ("train/", "eval/", "test/")
"""What the names of metrics in a phase's own run begin with, beside the sparsity of all layers together."""
_OF_CLASS = "/class_accuracy/"
_NOTE = "mlflow.note.content"


@dataclass(frozen=True)
class PhaseState:
    """A phase of a run as the phase store has it: complete, or begun by this run.

    `computed_by` is the MLflow run that computed it, empty where that is not known, and None where it is this run.
    `is_recorded`: its history is there to its end, too. `steps` are those of the plan, `steps_done` those that the run
    has come through; times are Unix time in ms, 0 where nothing is recorded yet. `metrics` are the last ones.
    """

    name: str
    kind: str
    fingerprint: str
    first_step: int
    steps: int
    lr: float
    pruned: str
    folder: Path
    computed_by: str | None
    is_complete: bool
    is_recorded: bool
    steps_done: int
    seconds: float
    started_ms: int
    ended_ms: int
    metrics: Mapping[str, float]

    @property
    def is_reused(self) -> bool:
        return self.computed_by is not None

    @property
    def last_step(self) -> int:
        return self.first_step + self.steps


def read_phases(plan: Mapping[str, Any], storage: Path) -> list[PhaseState]:
    """The phases of a plan, as JSON has it, that the storage has, or that the plan's run has begun."""
    found = []
    for phase in plan["phases"]:
        folder = storage / PHASES / phase["fingerprint"]
        owner = read_json(folder / PLAN)
        is_own = owner is None or run_name(owner) == run_name(plan)
        manifest = read_phase(folder)
        if manifest is None and not (is_own and (folder / HISTORY).exists()):
            continue
        first, last = _ends(folder / HISTORY)
        record = last or Record(step=phase["first_step"], time_ms=0, metrics={})
        found.append(
            PhaseState(
                name=phase["name"],
                kind=phase["kind"],
                fingerprint=phase["fingerprint"],
                first_step=phase["first_step"],
                steps=phase["steps"],
                lr=phase["lr"],
                pruned=_pruned(phase["pruning"]),
                folder=folder,
                computed_by=None if is_own else str(computing_run(folder).get("run_id", "")),
                is_complete=manifest is not None,
                is_recorded=record["step"] >= phase["first_step"] + phase["steps"],
                steps_done=phase["steps"] if manifest else record["step"] - phase["first_step"],
                seconds=manifest["seconds"] if manifest else _seconds(first, record),
                started_ms=_started_ms(first, phase["first_step"]),
                ended_ms=record["time_ms"],
                metrics=manifest["metrics"] if manifest else record["metrics"],
            )
        )
    return found


def _pruned(pruning: Mapping[str, Any] | None) -> str:
    """The share of the weights that is pruned, `least-most` where it is not the same in all layers."""
    shares = sorted(set(pruning["layers"].values())) if pruning is not None else []
    return "-".join(f"{share:g}" for share in dict.fromkeys([*shares[:1], *shares[-1:]]))


def _ends(history: Path) -> tuple[Record | None, Record | None]:
    """The first and the last complete record; what lies between them is not read."""
    try:
        with history.open("rb") as file:
            first = parse_record(file.readline())
            size = file.seek(0, os.SEEK_END)
            file.seek(max(0, size - _TAIL_BYTES))
            records = map(parse_record, reversed(file.readlines()))
            return first, next((record for record in records if record is not None), first)
    except OSError:
        return None, None


def _started_ms(first: Record | None, first_step: int) -> int:
    """When the step before the first record ended."""
    if first is None:
        return 0
    return first["time_ms"] - round(1000 * first["metrics"].get("time/step_s", 0.0) * (first["step"] - first_step))


def _seconds(first: Record | None, last: Record) -> float:
    return 0.0 if first is None else (last["time_ms"] - first["time_ms"]) / 1000


def costs_of(phases: Sequence[PhaseState], global_batch: int) -> dict[str, float]:
    """`cost/…`: seconds, steps and examples that a run computed itself, and those that it found in the phase store."""
    values = {}
    for suffix, is_reused in (("", False), ("_saved", True)):
        part = [phase for phase in phases if phase.is_reused == is_reused]
        steps = sum(phase.steps_done for phase in part)
        values[f"cost/seconds{suffix}"] = sum(phase.seconds for phase in part)
        values[f"cost/steps{suffix}"] = float(steps)
        values[f"cost/examples{suffix}"] = float(steps * global_batch)
    return values


# ------------------------------------------------------------------------------------------------------ the runs


class RunTree:
    """The run of a plan, as JSON has it, and those of its phases. Not thread-safe; raises whatever the store raises."""

    def __init__(self, uri: str, run_id: str, plan: Mapping[str, Any], storage: Path) -> None:
        self._uri, self._run_id, self._plan, self._storage = uri, run_id, plan, storage
        self._forget()

    def _forget(self) -> None:
        """After a failure only the store knows what it took."""
        self._runs: dict[str, Run] | None = None
        self._completed: set[str] = set()
        self._told: dict[str, str] = {}

    def grow(self) -> list[PhaseState]:
        """Gives every phase that is complete or has begun its run, and a run that is complete its end."""
        phases = read_phases(self._plan, self._storage)
        try:
            self._grow(phases, lambda phase: phase.is_complete and (phase.is_reused or phase.is_recorded))
        except Exception:
            self._forget()
            raise
        return phases

    def end(self, status: RunStatus, tags: Mapping[str, str]) -> list[PhaseState]:
        """Completes the tree, and says on the run what it came to; the run's own status is left as it is."""
        phases = read_phases(self._plan, self._storage)
        try:
            client = build_client(self._uri)
            # Nobody writes these histories any more.
            runs = self._grow(phases, lambda phase: phase.is_complete)
            for name, run in runs.items():
                if name not in self._completed:
                    client.set_terminated(run.info.run_id, "FAILED" if status == "FINISHED" else status)
            own = fetch_run(client, self._run_id)
            told = {**tags, **self._description(own, phases, runs)}
            log_final(client, own, self._came_to(phases), told)
        except Exception:
            self._forget()
            raise
        return phases

    def _grow(self, phases: Sequence[PhaseState], is_over: Callable[[PhaseState], bool]) -> dict[str, Run]:
        if self._told and all(phase.name in self._completed for phase in phases):
            return self._runs or {}
        client = build_client(self._uri)
        runs = self._known(client)
        for phase in phases:
            if phase.name not in runs:
                runs[phase.name] = self._create(client, phase)
            self._describe(client, runs[phase.name], phase)
            if phase.name not in self._completed and is_over(phase):
                self._complete(client, runs[phase.name].info.run_id, phase)
                self._completed.add(phase.name)
        self._tell(client, phases, runs)
        return runs

    def _known(self, client: MlflowClient) -> dict[str, Run]:
        """The runs of phases that are there, by the phase's name; those that were ended before their phase are open."""
        if self._runs is not None:
            return self._runs
        experiment = fetch_run(client, self._run_id).info.experiment_id
        condition = f"tags.`mlflow.parentRunId` = '{self._run_id}' and tags.`temper.kind` = 'phase'"
        order = ["attributes.start_time ASC"]
        runs: dict[str, Run] = {}
        completed = set()
        for run in client.search_runs([experiment], condition, max_results=1000, order_by=order):
            name = run.data.tags["temper.phase"]
            if name in runs:
                # A request to create it was sent twice, because its answer was lost.
                client.delete_run(run.info.run_id)
                continue
            runs[name] = run
            if run.info.status == "FINISHED":
                completed.add(name)
            else:
                client.update_run(run.info.run_id, status="RUNNING")
        self._runs, self._completed = runs, completed
        return runs

    def _create(self, client: MlflowClient, phase: PhaseState) -> Run:
        parent = client.get_run(self._run_id)
        tags = {
            "mlflow.parentRunId": self._run_id,
            "temper.kind": "phase",
            "temper.phase": phase.name,
            "temper.phase.kind": phase.kind,
            "temper.job": self._plan["job"]["name"],
            "temper.fingerprint": phase.fingerprint,
            "temper.reused": str(phase.is_reused).lower(),
            "temper.storage": parent.data.tags.get("temper.storage", ""),
            "temper.run_folder": parent.data.tags.get("temper.run_folder", ""),
            "temper.storage.id": parent.data.tags.get("temper.storage.id", ""),
            **({"temper.computed_by": phase.computed_by} if phase.computed_by else {}),
            **origin_tags(parent.data.tags.get("temper.command", "")),
        }
        # A phase that was there took no time here; and MLflow shows runs in the order of their beginnings.
        index = [each["name"] for each in self._plan["phases"]].index(phase.name)
        started_ms = phase.started_ms
        if phase.is_reused or not started_ms:
            started_ms = parent.info.start_time + index
        return create_run(client, parent.info.experiment_id, phase.name, tags, started_ms)

    def _describe(self, client: MlflowClient, run: Run, phase: PhaseState) -> None:
        """Its parameters, which a failure may have kept from it."""
        from mlflow.entities import Param

        params = {"phase.steps": str(phase.steps), "phase.lr": f"{phase.lr:g}", "phase.pruned": phase.pruned}
        new = {key: value for key, value in safe_params(params).items() if value and key not in run.data.params}
        if new:
            client.log_batch(run.info.run_id, params=[Param(*param) for param in new.items()], synchronous=True)
            run.data.params.update(new)

    def _complete(self, client: MlflowClient, run_id: str, phase: PhaseState) -> None:
        metrics = RunMetrics(self._uri, run_id)
        delivered = metrics.last_step()
        waiting = [record for record in _points(phase) if record["step"] > delivered]
        while batch := take_batch(waiting):
            metrics.send(batch)
            del waiting[: len(batch)]
        if not phase.is_reused:
            costs = {"cost/seconds": phase.seconds, "cost/steps": float(phase.steps)}
            log_final(client, client.get_run(run_id), costs, {})
        ended_ms = client.get_run(run_id).info.start_time if phase.is_reused else phase.ended_ms
        client.set_terminated(run_id, "FINISHED", end_time=ended_ms)

    def _tell(self, client: MlflowClient, phases: Sequence[PhaseState], runs: Mapping[str, Run]) -> None:
        """The tags from which a whole experiment can be read without asking for the phases' runs."""
        told = phases_tags([_summary(phase, runs[phase.name].info.run_id) for phase in phases])
        for key, value in told.items():
            if self._told.get(key) != value:
                client.set_tag(self._run_id, key, value)
        self._told = told

    def _description(self, run: Run, phases: Sequence[PhaseState], runs: Mapping[str, Run]) -> dict[str, str]:
        """What MLflow's page says of the run, unless a person has written something there."""
        command = run.data.tags.get("temper.command", "")
        opening = f"```\n{command}\n```"
        known = run.data.tags.get(_NOTE, opening)
        if not known.startswith(opening):
            return {}
        ids = {name: each.info.run_id for name, each in runs.items()}
        return {_NOTE: "\n\n".join([opening, *_note(run, phases, ids)])}

    def _came_to(self, phases: Sequence[PhaseState]) -> dict[str, float]:
        """What the run cost, and the parameters that its newest phase left."""
        values, model = costs_of(phases, self._plan["batch"]["global_batch"]), self._plan["model"]
        if phases:
            shapes = {weight["name"]: weight["shape"] for weight in model["prunable"]}
            values["parameters_left"] = parameters_left(model["num_parameters"], shapes, phases[-1].metrics)
        return values


def _note(run: Run, phases: Sequence[PhaseState], runs: Mapping[str, str]) -> list[str]:
    """The phases and the teachers of a run in Markdown, with links to what it came from."""
    here = f"#/experiments/{run.info.experiment_id}/runs"
    shown = [name for name in dict.fromkeys(n for p in phases for n in p.metrics) if _is_headline(name)]
    rows = [
        ["phase", "steps", "computed by", *shown],
        ["---"] * (3 + len(shown)),
        *(
            [
                f"[{phase.name}]({here}/{runs[phase.name]})",
                f"{phase.first_step:,}–{phase.last_step:,}",
                f"[another run]({here}/{phase.computed_by})" if phase.computed_by else "this run",
                *(f"{phase.metrics[name]:.4f}" if name in phase.metrics else "" for name in shown),
            ]
            for phase in phases
        ),
    ]
    teachers = {name: value for name, value in run.data.tags.items() if name.startswith("temper.teacher")}
    taught = [
        f"Taught by [{teachers[name.removesuffix('.run_id')].split(' ')[0]}]({here}/{run_id})."
        for name, run_id in teachers.items()
        if name.endswith(".run_id") and name.removesuffix(".run_id") in teachers
    ]
    table = "\n".join(f"| {' | '.join(row)} |" for row in rows)
    return [table, *taught]


def _is_headline(name: str) -> bool:
    return name.startswith("test/") and name.count("/") == 1


def _summary(phase: PhaseState, run_id: str) -> dict[str, Any]:
    return {
        "name": phase.name,
        "kind": phase.kind,
        "fingerprint": phase.fingerprint,
        "first_step": phase.first_step,
        "steps": phase.steps,
        "reused": phase.is_reused,
        "computed_by": phase.computed_by or "",
        "seconds": round(phase.seconds, 3),
        "started_ms": phase.started_ms,
        "ended_ms": phase.ended_ms,
        "run_id": run_id,
        "complete": phase.is_complete,
    }


def _points(phase: PhaseState) -> list[Record]:
    """The evaluations of a phase; of one that is reused the last one."""
    if phase.is_reused:
        last = Record(step=phase.last_step, time_ms=phase.ended_ms, metrics=dict(phase.metrics))
        return [_thinned(last)]
    records = []
    with (phase.folder / HISTORY).open("rb") as file:
        # Most records are of steps without one, and parsing takes longer than reading.
        for line in file:
            record = parse_record(line) if b'"eval/' in line else None
            if record is not None:
                records.append(_thinned(record))
    return records


def _thinned(record: Record) -> Record:
    """Without what is of interest in the job's own run only."""
    kept = {name: value for name, value in record["metrics"].items() if name == "sparsity" or _is_shown(name)}
    return Record(step=record["step"], time_ms=record["time_ms"], metrics=kept)


def _is_shown(name: str) -> bool:
    return name.startswith(_POINTS) and _OF_CLASS not in name
