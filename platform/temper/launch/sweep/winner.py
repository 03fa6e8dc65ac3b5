"""What becomes of a sweep's best trial: its export beside the sweep, a version in MLflow's registry, and the lines that
repeat it."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

from temper.errors import RunError, TemperError
from temper.files import read_json, write_json
from temper.launch.registering import register_product
from temper.launch.sweep.coordinator import SweepSpec
from temper.storage import storage_folder
from temper.tracking.mlflow_store import close_run, log_results
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

        product = find_product(str(trial_folder(spec, best["id"])), storage_folder(spec.storage))
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


def close_tree(spec: SweepSpec, result: SweepResult, display: SweepDisplay) -> None:
    """Gives the parent run its end: what came of the sweep."""
    if not result.parent_run_id:
        return
    best, objective = result.best, spec.space.objectives[0]
    metrics = {"sweep/phases_run": float(result.phases_run), "sweep/phases_reused": float(result.phases_reused)}
    tags = {"temper.sweep.left_behind": result.left_behind}
    if best is not None:
        metrics[f"best/{objective.metric}"] = best["metrics"][objective.metric]
        tags |= {"temper.best.trial": best["id"], "temper.best.run_id": best["run_id"]}
        tags["temper.best.overrides"] = " ".join(best["overrides"])
    try:
        log_results(spec.uri, result.parent_run_id, metrics, tags)
        close_run(spec.uri, result.parent_run_id, "FINISHED")
    except RunError as error:
        display.note(f"the sweep's own run lacks its end: {error}; the same command delivers it later")


def trial_folder(spec: SweepSpec, trial: str) -> Path:
    return spec.folder / "trials" / trial if spec.space.reuse else spec.folder / "alone" / trial / "run"
