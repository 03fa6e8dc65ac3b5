"""What becomes of a sweep's best trial: its export beside the sweep, a version in MLflow's registry, and the lines that
repeat it."""

from __future__ import annotations

from contextlib import ExitStack
from typing import TYPE_CHECKING, Any

from temper.errors import RunError, TemperError
from temper.files import read_json, write_json
from temper.launch.phase_store import keep_phase
from temper.launch.registering import register_product
from temper.launch.sweep.coordinator import SWEEP_RUN
from temper.launch.sweep.spec import SweepSpec
from temper.products import find_storage
from temper.run_folder import PHASES
from temper.storage import storage_folder
from temper.tracking.mlflow_store import RunStatus, close_run, log_results
from temper.tracking.sweep_progress import SweepDisplay

if TYPE_CHECKING:
    from temper.launch.sweep.driver import SweepResult

BEST = "best"
_RECORD = "winner.json"


def name_winner(spec: SweepSpec, best: dict[str, Any], display: SweepDisplay) -> dict[str, Any]:
    """Exports and registers the winner, unless that has been done. Returns `best` with where it is."""
    folder = spec.folder / BEST
    version = ""
    try:
        known = read_json(spec.folder / _RECORD) or {}
        if known.get("run_id") == best["run_id"] and (folder / "model.safetensors").is_file():
            return {**best, **known["places"]}
        display.stage(f"exporting {best['id']}")
        # Only now: it imports torch.
        from temper.export import export_product, find_product

        run_folder = spec.run_folder(best["id"])
        with ExitStack() as kept:
            keep_phase(find_storage(run_folder) / PHASES / best["phases"][-1]["fingerprint"], kept)
            product = find_product(str(run_folder), storage_folder(spec.storage))
            export_product(product, folder)
        if best["run_id"]:
            name = spec.space.winner.register_as or spec.space.name
            version = register_product(product, folder, name, spec.space.winner.alias)
        places = {"folder": str(folder), "registered": version}
        write_json(spec.folder / _RECORD, {"run_id": best["run_id"], "places": places})
        return {**best, **places}
    except TemperError as error:
        display.note(f"the winner is trained, and could not be exported or registered: {error}")
        return {**best, "folder": "", "registered": ""}


def log_outcome(spec: SweepSpec, result: SweepResult, display: SweepDisplay) -> None:
    """Tells the parent run what came of the sweep."""
    best, objective = result.best, spec.space.objectives[0]
    metrics = {"sweep/phases_run": float(result.phases_run), "sweep/phases_reused": float(result.phases_reused)}
    tags = {"temper.sweep.left_behind": result.left_behind}
    if best is not None:
        metrics[f"best/{objective.metric}"] = best["metrics"][objective.metric]
        tags |= {"temper.best.trial": best["id"], "temper.best.run_id": best["run_id"]}
        tags["temper.best.overrides"] = " ".join(best["overrides"])
    if result.parent_run_id:
        try:
            log_results(spec.uri, result.parent_run_id, metrics, tags)
        except RunError as error:
            display.note(f"the sweep's own run lacks what came of it: {error}")


def close_tree(spec: SweepSpec, status: RunStatus, display: SweepDisplay) -> None:
    """Gives the parent run its end."""
    run_id = (read_json(spec.folder / SWEEP_RUN) or {}).get("run_id")
    if run_id and not close_run(spec.uri, run_id, status):
        display.note("MLflow did not take the end of the sweep's own run")
