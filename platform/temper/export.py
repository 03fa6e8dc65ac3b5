"""From a run or checkpoint back to a model: to evaluate it, to write it out for plain PyTorch, or to serve it."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from temper.checkpoint import MASK, CheckpointReader, check_checkpoint, list_checkpoints
from temper.config.load import job_to_yaml
from temper.config.schema import JobConfig
from temper.data.augment import build_transforms
from temper.data.batches import eval_batches, normalized, stacked, transformed
from temper.data.sources import load_split
from temper.errors import CheckpointError, RunError
from temper.evaluation import evaluate
from temper.files import read_json
from temper.losses import build_loss
from temper.metrics import build_metrics
from temper.models.build import build_model
from temper.models.weights import CheckpointWeights, load_weights
from temper.outputs import logits_of
from temper.plan.facts import DataFacts, data_facts
from temper.plan.metric_names import without_classes
from temper.products import MODEL, Place, find_place
from temper.run_folder import CHECKPOINTS, JOB, PHASE_MANIFEST
from temper.targets import apply_target_folders

CARD = "README.md"
MASKS = "masks.safetensors"


@dataclass(frozen=True)
class Product:
    """A checkpoint together with the job that it came from. `plan` is that of its run (as JSON has it), `run` the
    `run.json` of it, empty without one."""

    job: JobConfig
    phase: str
    fingerprint: str
    checkpoint: Path
    metrics: dict[str, float]
    plan: Mapping[str, Any]
    run: dict[str, Any]

    @property
    def import_folders(self) -> tuple[str, ...]:
        """Where the `kind: python` targets of the job were."""
        return tuple(self.plan.get("import_folders", ()))


def find_product(reference: str, storage: Path, phase: str | None = None) -> Product:
    """What `RUN|CHECKPOINT` means: an MLflow run id, or the folder of a run, a phase or a checkpoint.

    `phase` names one of a run's phases; by default it is the last. The job is that of the run, also where another one
    computed the phase.

    Raises:
        JobError: there is no such thing, or the run has no such phase.
        CheckpointError: its checkpoint is missing or damaged.
    """
    place = find_place(reference, storage, phase)
    checkpoint = _checkpoint(place)
    problem = check_checkpoint(checkpoint)
    if problem is not None:
        raise CheckpointError(problem)
    records = CheckpointReader(checkpoint).records()
    metrics = records[-1]["metrics"] if records else {}
    return Product(place.job, place.phase, place.fingerprint, checkpoint, metrics, place.plan, place.run)


def _checkpoint(place: Place) -> Path:
    """The checkpoint itself; of a phase the one that it ended with, or its newest."""
    if place.kind == "checkpoint":
        return place.folder
    manifest = read_json(place.folder / PHASE_MANIFEST)
    if manifest is not None:
        return place.folder / str(manifest["checkpoint"])
    complete = list_checkpoints(place.folder / CHECKPOINTS)
    if not complete:
        raise CheckpointError(f"{place.folder / CHECKPOINTS}: no complete checkpoint yet")
    return complete[-1]


def load_model(product: Product) -> tuple[nn.Module, DataFacts]:
    """The product's model with its full fp32 weights, in evaluation mode, on the CPU.

    A `kind: python` module is looked for in the working directory, and where it was when the product was trained.
    """
    folders = [Path.cwd(), *(Path(folder) for folder in product.import_folders)]
    apply_target_folders(folders)
    facts = data_facts(product.job.data, folders[-1], taught=product.job.distill is not None)
    model = build_model(product.job.model, facts, product.job.seed)
    load_weights(model, CheckpointWeights(product.checkpoint))
    return model.eval(), facts


def evaluate_product(product: Product) -> dict[str, float]:
    """Loss and metrics on the job's test split, in one process, in fp32."""
    model, facts = load_model(product)
    job = product.job
    split = load_split(job.data, "test", job.storage_folder, facts)
    batches = eval_batches(job.data, split, facts, rank=0, world_size=1, batch=job.evaluation.batch)
    device = torch.device("cpu")
    with torch.inference_mode():
        values = evaluate(model, batches, build_loss(job.loss), build_metrics(job.evaluation, facts, device), device)
    return {f"test/{name}": value for name, value in values.items()}


class Inference(nn.Module):
    """A network with what temper does before and after it: inputs as the data set has them → logits (examples, …)."""

    def __init__(self, network: nn.Module, facts: DataFacts) -> None:
        super().__init__()
        self.network = network
        self._facts = facts

    def forward(self, inputs: Tensor) -> Tensor:
        return logits_of(self.network(normalized(inputs, self._facts)))


@dataclass(frozen=True)
class Servable:
    """`module` as users call it, in evaluation mode on the CPU. `inputs` are a few examples of the test split: images
    uint8 in 0…255 or float32 in 0…1, token ids int64, other values as they are. Its dimensions `free` may be of any
    size."""

    module: nn.Module
    inputs: Tensor
    free: tuple[int, ...]


_EXAMPLES = 2  # one alone would make a graph for batches of one


def build_servable(product: Product) -> Servable:
    """The product as a network for those who have no temper: scaling and normalisation of the inputs are part of it.

    Raises RunError where the test split, whose examples come with it, cannot be read.
    """
    model, facts = load_model(product)
    data = product.job.data
    try:
        split = load_split(data, "test", product.job.storage_folder, facts)
        inputs, _ = split.examples(torch.arange(_EXAMPLES) % len(split))
        ready = stacked(transformed(build_transforms(data.eval_transforms), inputs), facts)
    except Exception as error:  # a data set of the user's may fail in any way
        raise RunError(f"the test split cannot be read: {type(error).__name__}: {error}") from error
    # A text may be shorter than the context of the built-in language model.
    return Servable(Inference(model, facts).eval(), ready, (0, 1) if product.job.model.kind == "gpt" else (0,))


def export_product(product: Product, to: Path) -> dict[str, Any]:
    """Writes `model.safetensors`, `job.yaml` and the model card `README.md` into `to`, each whole or not at all.

    Of a sparse phase also `masks.safetensors`: by the names of the pruned weights, true where a weight is kept.
    """
    model, facts = load_model(product)
    reader = CheckpointReader(product.checkpoint)
    masks = {name: reader.full(MASK, name).contiguous() for name in reader.names(MASK)}
    to.mkdir(parents=True, exist_ok=True)
    weights = {name: tensor.detach().clone().contiguous() for name, tensor in model.state_dict().items()}
    _save(weights, to / MODEL, product)
    if masks:
        _save(masks, to / MASKS, product)
    else:
        # Of another phase that was exported into the same folder.
        (to / MASKS).unlink(missing_ok=True)
    (to / JOB).write_text(job_to_yaml(product.job))
    (to / CARD).write_text(_model_card(product, facts, model, masks))
    num_parameters = sum(param.numel() for param in model.parameters())
    num_pruned = sum(int((~mask).sum()) for mask in masks.values())
    counts = {"parameters": num_parameters, "pruned": num_pruned, "tensors": len(weights)}
    return {"folder": str(to), "phase": product.phase, **counts, "metrics": product.metrics}


def _save(tensors: dict[str, Tensor], path: Path, product: Product) -> None:
    temporary = path.with_name(f".{path.stem}.{os.getpid()}.safetensors")
    save_file(tensors, temporary, metadata={"format": "pt", "temper.fingerprint": product.fingerprint})
    os.replace(temporary, path)


def _model_card(product: Product, facts: DataFacts, model: nn.Module, masks: dict[str, Tensor]) -> str:
    job = product.job
    last = without_classes(product.metrics)
    metrics = {name: value for name, value in last.items() if name.startswith(("eval/", "test/"))}
    rows = "\n".join(f"| {name} | {value:.6g} |" for name, value in sorted(metrics.items()))
    section = json.dumps(job.model.model_dump(mode="json", exclude_none=True))
    return f"""# {job.name}

Trained by temper: phase `{product.phase}`, {product.checkpoint.name}, seed {job.seed}.

| metric | value |
|---|---|
{rows}

* data: {job.data.kind}, {facts.train_examples} training examples of shape {list(facts.shape)}; inputs are scaled
  to 0…1, then normalised with mean {list(facts.mean)} and standard deviation {list(facts.std)}
* model: `{section}`, {facts.num_classes} classes, {sum(param.numel() for param in model.parameters()):,} parameters
{_teachers(job)}* precision of training: {job.precision.dtype}; the weights in `model.safetensors` are the fp32 masters
* fingerprint of the phase: `{product.fingerprint}`; `temper train job.yaml` repeats it

## Use in plain PyTorch

```python
from safetensors.torch import load_file

model.load_state_dict(load_file("model.safetensors"))
model.eval()
```

where `model` is

```
{model}
```
{_masks_section(masks) if masks else ""}"""


def _teachers(job: JobConfig) -> str:
    if job.distill is None:
        return ""
    named = job.distill.teacher if isinstance(job.distill.teacher, list) else [job.distill.teacher]
    names = [teacher if isinstance(teacher, str) else teacher.source or teacher.weights for teacher in named]
    return f"* distilled from {', '.join(f'`{name}`' for name in names)}\n"


def _masks_section(masks: dict[str, Tensor]) -> str:
    rows = "\n".join(f"| `{name}` | {int((~mask).sum()):,} of {mask.numel():,} |" for name, mask in masks.items())
    return f"""
## Pruned weights

Pruned weights are exactly zero in `model.safetensors`; `masks.safetensors` is true where a weight is kept.

| weight | pruned |
|---|---|
{rows}

To train on without them, begin with a new optimizer, and keep their gradients at zero: no step of SGD, Adam, AdamW or
Adagrad then moves them, with momentum and weight decay or without.

```python
weights = dict(model.named_parameters())
for name, kept in load_file("masks.safetensors").items():
    weights[name].register_hook(lambda gradient, kept=kept: gradient * kept.to(gradient.device))
```
"""
