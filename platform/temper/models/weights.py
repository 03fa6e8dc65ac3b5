"""Trained weights on disk, and how a network that is not trained here takes them: whole, or in ranges."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Protocol
from unittest import mock

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn
from torch.utils.weak import WeakIdKeyDictionary

from temper.checkpoint import CheckpointReader, model_kinds
from temper.errors import CheckpointError


class Weights(Protocol):
    """Parameters and persistent buffers by their names in the model."""

    @property
    def place(self) -> Path: ...

    @property
    def shapes(self) -> Mapping[str, tuple[int, ...]]: ...

    def read(self, name: str, start: int = 0, numel: int | None = None) -> Tensor:
        """The flat range `[start, start + numel)` of a tensor, by default all of it."""


class CheckpointWeights:
    """The model in a checkpoint, in fp32; connectors that were trained beside it are no part of it."""

    def __init__(self, folder: Path) -> None:
        self.place, self._reader = folder, CheckpointReader(folder)
        self._kinds = model_kinds(self._reader)
        self.shapes = {name: self._reader.shapes[name] for name in self._kinds}

    def read(self, name: str, start: int = 0, numel: int | None = None) -> Tensor:
        return self._reader.read(self._kinds[name], name, start, numel)


class SafetensorsWeights:
    """A safetensors file, as it is. Raises CheckpointError where it is none."""

    def __init__(self, path: Path) -> None:
        self.place = path
        try:
            self._file = safe_open(path, framework="pt")
        except (OSError, SafetensorError) as error:
            raise CheckpointError(f"{path}: cannot be read as safetensors: {error}") from error
        self.shapes = {name: tuple(self._file.get_slice(name).get_shape()) for name in self._file.keys()}  # noqa: SIM118

    def read(self, name: str, start: int = 0, numel: int | None = None) -> Tensor:
        shape = self.shapes[name]
        if numel is None or not shape:
            return self._file.get_tensor(name).reshape(-1)
        if numel == 0:
            return torch.empty(0)
        row = math.prod(shape[1:])
        first, stop = start // row, -(-(start + numel) // row)
        rows: Tensor = self._file.get_slice(name)[first:stop]
        return rows.reshape(-1)[start - first * row :][:numel]


def check_weights(model: nn.Module, weights: Weights) -> None:
    """Raises CheckpointError where `weights` are not those of `model`. A tensor that the model has under several names
    need be there under one."""
    state = model.state_dict(keep_vars=True)
    given = {id(state[name]) for name in weights.shapes if name in state}
    missing = [name for name, tensor in state.items() if id(tensor) not in given]
    unexpected = [name for name in weights.shapes if name not in state]
    if missing or unexpected:
        raise CheckpointError(f"{weights.place}: is not of this model; missing {missing}, unexpected {unexpected}")
    for name, shape in weights.shapes.items():
        if tuple(state[name].shape) != shape:
            expected = list(state[name].shape)
            raise CheckpointError(
                f"{weights.place}: {name} has the shape {list(shape)}, and the model's is {expected}; "
                "the model was built in another way"
            )


@torch.no_grad()
def load_weights(model: nn.Module, weights: Weights) -> None:
    """Puts `weights` into `model`. Raises CheckpointError where they are not its own."""
    check_weights(model, weights)
    state = model.state_dict(keep_vars=True)
    for name, shape in weights.shapes.items():
        state[name].copy_(weights.read(name).view(shape))


@contextmanager
def parameters_on_meta() -> Iterator[None]:
    """Within it a module's parameters lose their memory, and their values, as they are registered; buffers keep both.

    So a model whose weights are to be read can be built where it does not fit. A parameter that the model has under
    several names stays one.
    """
    register = nn.Module.register_parameter
    emptied: WeakIdKeyDictionary = WeakIdKeyDictionary()

    def register_empty(module: nn.Module, name: str, param: nn.Parameter | None) -> None:
        if param is not None and not param.is_meta:
            if param not in emptied:
                emptied[param] = nn.Parameter(torch.empty_like(param, device="meta"), param.requires_grad)
            param = emptied[param]
        register(module, name, param)

    with mock.patch.object(nn.Module, "register_parameter", register_empty):
        yield
