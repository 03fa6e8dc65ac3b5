"""An export in MLflow's registry, as a version of a model.

A version has the export's files, by which it can teach, and an MLflow model of it, which is loaded and served without
temper. Where torch.export makes no graph of a user's network it has the files only, and is tagged so.
"""

from __future__ import annotations

import shutil
import tempfile
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from temper.config.space import Objective
from temper.errors import TemperError
from temper.files import describe_file
from temper.launch.champion import CHAMPION, METRIC, job_objective, offer_champion
from temper.launch.lineage import TEACHER, lineage_text
from temper.launch.phase_store import keep_phase
from temper.products import MODEL, find_storage
from temper.run_folder import JOB, PHASES
from temper.tracking.description import redact_yaml
from temper.tracking.flavor import save_flavor
from temper.tracking.redact import redact_text
from temper.tracking.registry import PHASE, Export, find_version, register_export, set_alias

if TYPE_CHECKING:
    from temper.export import Product, Servable


@dataclass(frozen=True)
class Registered:
    """A version of a registered model: `uri` names it for ever, `alias` is the one that it has got, empty where it is
    not the champion. `note` says, for people, what came of that, and what else they should know."""

    uri: str
    alias: str
    note: str

    @property
    def is_champion(self) -> bool:
        return self.alias == CHAMPION


def register_run(run_folder: Path, name: str, objective: Objective | None = None) -> Registered:
    """Exports what the last phase of a run ended with, and offers it as champion of the model `name`.

    Raises TemperError where it cannot be exported, or where MLflow does not take it.
    """
    # Only now: it imports torch.
    from temper.export import export_product, find_product

    storage = find_storage(run_folder)
    with ExitStack() as kept, tempfile.TemporaryDirectory() as folder:
        product = find_product(str(run_folder), storage)
        keep_phase(storage / PHASES / product.fingerprint, kept)
        export_product(product, Path(folder))
        return register_product(product, Path(folder), name, objective=objective)


def register_product(
    product: Product, folder: Path, name: str, alias: str = CHAMPION, objective: Objective | None = None
) -> Registered:
    """Makes the export of `product` that lies in `folder` a version of the model `name`, unless there is one of the
    same run, phase and checkpoint.

    The version gets the alias; but that of the champion only if it is better by `objective`, by default
    :func:`job_objective`. Raises RunError where MLflow does not take it.
    """
    uri = product.run["uri"]
    objective = objective or job_objective(product.job)
    notes: list[str] = []
    version = find_version(uri, name, product.run["run_id"], _identity(product))
    if version is None:
        version, notes = _register(product, folder, name, objective)
    gets_alias = True
    if alias == CHAMPION:
        gets_alias, note = offer_champion(uri, name, version, objective)
        notes.append(note)
    else:
        set_alias(uri, name, alias, version)
    return Registered(f"models:/{name}/{version}", alias if gets_alias else "", "; ".join(notes))


def _register(product: Product, folder: Path, name: str, objective: Objective) -> tuple[str, list[str]]:
    """The new version, and what is to be said of it."""
    metrics = _metrics(product, objective)
    with tempfile.TemporaryDirectory() as temporary:
        place = Path(temporary) / "model"
        servable, reason = _save_servable(product, place)
        takes = f"Only temper can load it: {reason}." if servable is None else _takes(servable)
        card = _add_files(folder, place, "" if servable is None else _usage(name, takes))
        export = Export(
            name=name,
            run_id=product.run["run_id"],
            folder=place,
            title=f"{product.job.name} {product.phase}",
            tags={
                **_tags(product, folder),
                **{f"{METRIC}{metric}": repr(value) for metric, value in metrics.items()},
                "temper.loadable": str(servable is not None).lower(),
            },
            description="\n\n".join([card.partition("\n## ")[0].rstrip(), takes]),
            metrics=tuple(metrics),
        )
        return register_export(product.run["uri"], export), [] if servable is not None else [takes]


def _save_servable(product: Product, place: Path) -> tuple[Servable | None, str]:
    """Makes the folder `place`, with an MLflow model in it; where that cannot be, empty, and says why."""
    from temper.export import build_servable

    try:
        servable = build_servable(product)
        save_flavor(servable.module, servable.inputs, servable.free, place)
        return servable, ""
    except TemperError as error:
        shutil.rmtree(place, ignore_errors=True)
        place.mkdir()
        return None, str(error)


def _add_files(folder: Path, place: Path, usage: str) -> str:
    """Puts the export's files beside the MLflow model; returns the model card, which ends with `usage`."""
    from temper.export import CARD, MASKS

    for file in (MODEL, MASKS):
        if (folder / file).is_file():
            (place / file).symlink_to((folder / file).absolute())
    (place / JOB).write_text(redact_yaml((folder / JOB).read_text()))
    card = redact_text((folder / CARD).read_text()) + usage
    (place / CARD).write_text(card)
    return card


# ------------------------------------------------------------------------------------------------- what it is told by


def _identity(product: Product) -> dict[str, str]:
    """The tags that tell the versions of a run apart."""
    names = {PHASE: product.phase, "temper.fingerprint": product.fingerprint}
    return {**names, "temper.checkpoint": product.checkpoint.name}


def _tags(product: Product, folder: Path) -> dict[str, str]:
    from safetensors.torch import load_file

    from temper.export import MASKS

    tags = {**_identity(product), "temper.run_id": product.run["run_id"], "temper.job": product.job.name}
    tags["temper.parameters"] = str(product.plan["model"]["num_parameters"])
    masks = folder / MASKS
    if masks.is_file():
        tags["temper.pruned"] = str(sum(int((~kept).sum()) for kept in load_file(masks).values()))
        tags["temper.masks"] = f"{MASKS} sha256:{describe_file(masks)['sha256']}"
    if product.job.distill is not None:
        tags[TEACHER] = lineage_text(product.plan, product.run["uri"])
    return tags


def _metrics(product: Product, objective: Objective) -> dict[str, float]:
    """Of the product's last metrics those that the job evaluates, and the objective."""
    evaluated = ("loss", *product.job.evaluation.metrics)
    names = {f"{split}/{metric}" for split in ("eval", "test") for metric in evaluated} | {objective.metric}
    return {name: float(value) for name, value in sorted(product.metrics.items()) if name in names}


_VALUES = {
    "uint8": "pixels from 0 to 255, uint8",
    "int64": "token ids, int64",
    "float32": "values as the data set has them (of images from 0 to 1), float32",
}


def _takes(servable: Servable) -> str:
    """What the model takes and gives, in a sentence."""
    inputs = servable.inputs
    sizes = [f"up to {size}" if dim in servable.free else str(size) for dim, size in enumerate(inputs.shape)][1:]
    values = _VALUES[str(inputs.dtype).removeprefix("torch.")]
    return f"Takes {values}, of the shape ({', '.join(['examples', *sizes])}), and gives logits."


def _usage(name: str, takes: str) -> str:
    uri = f"models:/{name}/VERSION"
    return f"""
## Use with MLflow

{takes}
Scaling and normalisation are part of it. It needs torch and mlflow, no more; `MLFLOW_TRACKING_URI` says where the
registry is.

```sh
mlflow models serve -m "{uri}" --env-manager local
curl localhost:5000/invocations -H "Content-Type: application/json" -d @serving_input_example.json
```

```python
logits = mlflow.pyfunc.load_model("{uri}").predict(inputs)  # NumPy arrays
network = mlflow.pytorch.load_model("{uri}")  # a torch.nn.Module on the CPU, for inference
```
"""
