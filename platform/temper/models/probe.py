"""Builds a model and measures it for the plan: `python -m temper.models.probe [FOLDER …]`, question and answer in JSON.

The folders are searched for `kind: python` targets. Standard input holds what `temper.plan.probe.model_question`
gives. The last line of standard output is `{"facts": {…}}` or `{"problems": [{…}]}`; whatever the model's own code
prints goes to standard error. The model is built on the meta device, where tensors have shapes and no memory; code
that cannot do that is run on the CPU.
"""

from __future__ import annotations

import contextlib
import json
import sys
import traceback
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from pydantic import TypeAdapter
from torch import Tensor, nn
from torch.autograd.graph import saved_tensors_hooks
from torch.utils.flop_counter import FlopCounterMode

import temper
from temper.config.schema import ModelConfig
from temper.errors import JobError, Problem
from temper.models.build import build_model
from temper.plan.facts import DataFacts
from temper.plan.probe import ModelFacts
from temper.targets import apply_target_folders

_DEVICES = ("meta", "cpu")
# Two sizes tell what grows with the batch from what does not; one example is too few for some batch norms.
_BATCHES = (2, 4)


def measure(model: nn.Module, shape: tuple[int, ...], device: str) -> ModelFacts:
    """The facts of a model for inputs of `shape` (one example), by forward passes in training mode on `device`."""
    model.train()
    small, large = (_forward(model, torch.zeros((batch, *shape), device=device)) for batch in _BATCHES)
    examples = _BATCHES[1] - _BATCHES[0]
    sizes = [parameter.numel() for parameter in model.parameters() if parameter.requires_grad]
    return ModelFacts(
        num_parameters=sum(parameter.numel() for parameter in model.parameters()),
        num_trainable=sum(sizes),
        parameter_sizes=tuple(sizes),
        buffer_bytes=sum(buffer.numel() * buffer.element_size() for buffer in model.buffers()),
        activation_bytes_per_example=max(large[0] - small[0], 0) // examples,
        forward_flops_per_example=max(large[1] - small[1], 0) // examples,
        output_shape=large[2],
    )


def _forward(model: nn.Module, inputs: Tensor) -> tuple[int, int, tuple[int, ...] | None]:
    """Bytes that autograd keeps (beside parameters and buffers), FLOPs, and the shape of one example's output."""
    own = {_storage_id(tensor) for tensor in (*model.parameters(), *model.buffers())}
    kept: dict[int, torch.UntypedStorage] = {}

    def keep(tensor: Tensor) -> Tensor:
        if _storage_id(tensor) not in own:
            kept[_storage_id(tensor)] = tensor.untyped_storage()
        return tensor

    counter = FlopCounterMode(display=False)
    with counter, saved_tensors_hooks(keep, lambda tensor: tensor):
        outputs = model(inputs)
    logits = _logits(outputs)
    shape = None if logits is None or logits.dim() == 0 else tuple(logits.shape[1:])
    return sum(storage.nbytes() for storage in kept.values()), counter.get_total_flops(), shape


def _storage_id(tensor: Tensor) -> int:
    """The same for all views of one tensor, also on the meta device, where every address is 0."""
    return int(tensor.untyped_storage()._cdata)


def _logits(outputs: Any) -> Tensor | None:
    if isinstance(outputs, Tensor):
        return outputs
    logits = outputs.get("logits") if isinstance(outputs, Mapping) else getattr(outputs, "logits", None)
    return logits if isinstance(logits, Tensor) else None


def answer(question: dict[str, Any]) -> dict[str, Any]:
    """`{"facts": …}` for a model that works on one of the devices, else `{"problems": …}` of the last one tried."""
    config: ModelConfig = TypeAdapter(ModelConfig).validate_python(question["model"])
    data = _data_facts(question)
    problem = None
    for device in _DEVICES:
        try:
            with torch.device(device):
                model = build_model(config, data, 0)
        except JobError as error:
            return {"problems": [asdict(problem) for problem in error.problems]}
        except Exception as error:  # the model's own code may raise anything
            problem = _problem(config, "cannot be built", error)
            continue
        try:
            return {"facts": asdict(measure(model, data.shape, device))}
        except Exception as error:
            problem = _problem(config, f"does not take an input of the shape {(_BATCHES[0], *data.shape)}", error)
    assert problem is not None, "every device that failed left a problem"
    return {"problems": [asdict(problem)]}


def _data_facts(question: dict[str, Any]) -> DataFacts:
    """As much of the data as a model may depend on."""
    return DataFacts(
        train_examples=0,
        validation_examples=0,
        test_examples=0,
        shape=tuple(question["shape"]),
        num_classes=question["num_classes"],
        mean=(),
        std=(),
        fingerprint="",
    )


def _problem(config: ModelConfig, rule: str, error: Exception) -> Problem:
    value = getattr(config, "target", None) or getattr(config, "name", config.kind)
    lines = str(error).strip().splitlines()
    return Problem(
        "model", value, f"{rule}: {type(error).__name__}{': ' if lines else ''}{' '.join(lines[:3])}{_place(error)}"
    )


def _place(error: Exception) -> str:
    """Where in the user's own code the error rose."""
    libraries = (str(Path(temper.__file__).parent), "site-packages", "<frozen")
    for frame in reversed(traceback.extract_tb(error.__traceback__)):
        if not any(part in frame.filename for part in libraries):
            return f" ({Path(frame.filename).name}, line {frame.lineno})"
    return ""


def main() -> None:
    apply_target_folders([Path(folder) for folder in sys.argv[1:]])
    question = json.load(sys.stdin)
    with contextlib.redirect_stdout(sys.stderr):
        reply = answer(question)
    print(json.dumps(reply))


if __name__ == "__main__":
    main()
