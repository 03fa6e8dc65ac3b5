"""Where a step first went non-finite: the module by name, found by running the batch again on a twin with hooks."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

LossTerms = Callable[[Any, Tensor], Mapping[str, Tensor]]


@dataclass(order=True)
class Finding:
    """`order` counts the outputs, or the gradients, that were finite before it; `place` says where it is."""

    order: int
    place: str


@dataclass
class _Search:
    """What hooks on a model's modules and parameters see; only the first non-finite value is kept."""

    seen: int = 0
    found: Finding | None = None
    handles: list[Any] = field(default_factory=list)

    def look(self, values: Any, place: str) -> None:
        if self.found is None and not all(bool(value.isfinite().all()) for value in _floats(values)):
            self.found = Finding(self.seen, place)
        self.seen += 1

    def watch(self, model: nn.Module) -> None:
        """Outputs of modules in the order in which they are made, the innermost first; gradients of these outputs and
        of parameters in the order of the backward pass."""
        for name, module in model.named_modules():
            self.handles.append(module.register_forward_hook(self._output_hook(name or "the model")))
        for name, param in model.named_parameters():
            if param.requires_grad:
                module_name, _, own = name.rpartition(".")
                place = f"first non-finite gradient in {module_name or 'the model'} ({own})"
                self.handles.append(param.register_post_accumulate_grad_hook(self._sum_hook(place)))

    def unwatch(self) -> None:
        for handle in self.handles:
            handle.remove()

    def _output_hook(self, name: str) -> Callable[..., None]:
        def hook(module: nn.Module, args: Any, output: Any) -> None:
            self.look(output, f"first non-finite output in {name}")
            for value in _floats(output):
                if value.requires_grad:
                    value.register_hook(self._gradient_hook(f"first non-finite gradient in {name} (its output)"))

        return hook

    def _gradient_hook(self, place: str) -> Callable[[Tensor], None]:
        def hook(grad: Tensor) -> None:
            self.look(grad, place)

        return hook

    def _sum_hook(self, place: str) -> Callable[[Tensor], None]:
        def hook(param: Tensor) -> None:
            self.look(param.grad, place)

        return hook


@contextmanager
def _watched(model: nn.Module) -> Iterator[_Search]:
    search = _Search()
    search.watch(model)
    try:
        yield search
    finally:
        search.unwatch()


def first_non_finite(
    twin: nn.Module,
    loss: LossTerms,
    micro_batches: Iterable[tuple[Tensor, Tensor]],
    factor: float,
    group: dist.ProcessGroup | None,
) -> str | None:
    """Where the first non-finite value of a step is, in words; None where each micro-batch of each rank is finite.

    In a micro-batch outputs come before gradients, which are those of `factor` × loss; of parameters they are summed
    over the micro-batches so far. Collective over `group` (None: this rank alone), which has equally many micro-batches
    on every rank: all ranks run the same passes, so that a batch norm over ranks works, and stop together at the
    earliest finding of any.
    """
    for inputs, targets in micro_batches:
        with _watched(twin) as search:
            search.look(inputs, "non-finite values in the inputs")
            terms = loss(twin(inputs), targets)
            search.look(list(terms.values()), "non-finite loss of finite outputs")
            if place := _earliest(search.found, group):
                return place
            search.seen = 0
            (torch.stack(list(terms.values())).sum().float() * factor).backward()
            if place := _earliest(search.found, group):
                return place
    return None


def _earliest(found: Finding | None, group: dist.ProcessGroup | None) -> str | None:
    """The place of the earliest finding over the ranks."""
    findings = [found]
    if group is not None:
        findings = [None] * dist.get_world_size(group)
        dist.all_gather_object(findings, found, group=group)
    places = [finding for finding in findings if finding is not None]
    return min(places).place if places else None


def _floats(values: Any) -> Iterator[Tensor]:
    """The floating-point tensors in a module's output: a tensor, or tuples, lists and mappings of them."""
    if isinstance(values, Tensor):
        if values.is_floating_point():
            yield values
    elif isinstance(values, Mapping):
        for value in values.values():
            yield from _floats(value)
    elif isinstance(values, list | tuple):
        for value in values:
            yield from _floats(value)
