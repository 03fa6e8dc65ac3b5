"""What becomes of a sweep's best trial: its export beside the sweep, a version in MLflow's registry, and the lines that
repeat it."""

from __future__ import annotations

from contextlib import ExitStack
from dataclasses import replace
from typing import Any

from temper.files import read_json, write_json
from temper.launch.phase_store import keep_phase
from temper.launch.registering import register_product
from temper.launch.sweep.spec import SweepSpec
from temper.products import find_storage
from temper.run_folder import PHASES
from temper.storage import storage_folder
from temper.tracking.mlflow_store import first_line
from temper.tracking.sweep_progress import SweepDisplay

BEST = "best"
WINNER = "winner.json"
_NOWHERE = {"folder": "", "registered": "", "alias": "", "note": ""}


def name_winner(spec: SweepSpec, best: dict[str, Any], display: SweepDisplay) -> dict[str, Any]:
    """Exports and registers the winner, unless that has been done. Returns `best` with where it is: the `folder`, the
    version `registered`, the `alias` that names it, if it got one, and a `note` on that. Never raises: the sweep has
    come to its end, and the same command tries again what fails here."""
    folder, places = spec.folder / BEST, dict(_NOWHERE)
    try:
        known = read_json(spec.folder / WINNER) or {}
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
        places["folder"] = str(folder)
        if best["run_id"]:
            winner, objective = spec.space.winner, spec.space.objectives[0]
            # What is compared need not be among the product's own metrics, as `parameters_left` is not.
            measured = replace(
                product, metrics={**product.metrics, objective.metric: best["metrics"][objective.metric]}
            )
            name = winner.register_as or spec.space.name
            registered = register_product(measured, folder, name, winner.alias, objective)
            places |= {"registered": registered.uri, "alias": registered.alias, "note": registered.note}
        write_json(spec.folder / WINNER, {"run_id": best["run_id"], "places": places})
    except Exception as error:  # which one depends on the disk, on torch and on the store
        done = "exported, and could not be registered" if places["folder"] else "trained, and could not be exported"
        display.note(f"the winner is {done}: {first_line(error)}; the same command tries it again")
    return {**best, **places}
