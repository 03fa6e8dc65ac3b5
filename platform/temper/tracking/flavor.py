"""A network as an MLflow model: `mlflow.pytorch` and `mlflow.pyfunc` load it, `mlflow models serve` serves it.

What is saved is one graph of `torch.export` with its weights: neither pickled nor code of ours, so that who loads it
needs torch and mlflow, no more. As in :mod:`mlflow_store`, mlflow is imported only inside functions.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from temper.errors import RunError
from temper.tracking.mlflow_store import first_line

if TYPE_CHECKING:
    import numpy.typing as npt
    from mlflow.types import Schema
    from torch import Tensor, nn

_REASON_LENGTH = 300


def save_flavor(module: nn.Module, inputs: Tensor, free: Sequence[int], folder: Path) -> None:
    """Saves `module` as an MLflow model in the new `folder`, with its signature and `inputs` as input example.

    `module` is on the CPU and in evaluation mode, and takes and gives one tensor. The dimensions `free` of both may be
    of any size; `inputs` has at least two of each. Raises RunError where torch.export makes no graph of it, or one that
    holds for these sizes only.
    """
    import mlflow
    import mlflow.pytorch
    import torch
    from mlflow.models import Model, ModelSignature

    model = Model()
    try:
        with torch.no_grad():
            outputs = module(inputs)
            mlflow.pytorch.save_model(
                module,
                str(folder),
                mlflow_model=model,
                signature=ModelSignature(_schema(inputs, free), _schema(outputs, free)),
                input_example=inputs.numpy(),
                serialization_format="pt2",
                pip_requirements=[f"torch=={torch.__version__.partition('+')[0]}", f"mlflow=={mlflow.__version__}"],
            )
            _check_sizes(module, mlflow.pytorch.load_model(str(folder)), inputs, free)
    except Exception as error:  # of every kind: the network is the user's, and torch.export has many
        raise RunError(f"torch.export makes no graph of it: {first_line(error)[:_REASON_LENGTH]}") from error
    # A graph stays on the device that it was made on; by default MLflow refuses to load it where there is a GPU.
    model.flavors["python_function"]["config"]["device"] = "cpu"
    model.save(str(folder / "MLmodel"))


def _schema(tensor: Tensor, free: Sequence[int]) -> Schema:
    from mlflow.types import Schema, TensorSpec

    array: npt.NDArray[Any] = tensor.numpy()
    shape = tuple(-1 if dim in free else size for dim, size in enumerate(array.shape))
    return Schema([TensorSpec(array.dtype, shape)])


def _check_sizes(module: nn.Module, loaded: nn.Module, inputs: Tensor, free: Sequence[int]) -> None:
    """torch.export quietly makes a dimension fixed where a network's code depends on its size."""
    import torch

    small = inputs
    for dim in free:
        small = small.narrow(dim, 0, 1)
    for sizes in (small, torch.cat([inputs, small.expand_as(inputs)])):
        torch.testing.assert_close(loaded(sizes), module(sizes), rtol=1e-4, atol=1e-5)
