"""An export in MLflow's registry, as a version of a model."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from temper.products import MODEL
from temper.run_folder import JOB

if TYPE_CHECKING:
    from temper.export import Product


def register_product(product: Product, folder: Path, name: str, alias: str | None) -> str:
    """Makes the export of `product` that lies in `folder` a version of the model `name`; returns its URI.

    Raises RunError where MLflow does not take it.
    """
    from temper.export import CARD, MASKS
    from temper.tracking.mlflow_store import redact_yaml
    from temper.tracking.registry import register_export

    files = {file: folder / file for file in (MODEL, MASKS, CARD) if (folder / file).is_file()}
    texts = {JOB: redact_yaml((folder / JOB).read_text())}
    run, path = product.run, f"{product.phase}/{product.checkpoint.name}"
    version = register_export(run["uri"], run["run_id"], files, texts, path, name, alias)
    return f"models:/{name}/{version}"
