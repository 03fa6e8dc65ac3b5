"""A frozen network that no rank holds: shared out over all ranks, gathered module by module as it computes.

It is ZeRO-3 (Rajbhandari et al. 2020, section 5.3) without an optimizer, put together here from DeepSpeed's parts,
because `deepspeed.initialize` and `deepspeed.zero.Init` as a context change what other engines in the process compute:
they replace the mesh that DeepSpeed looks up, and for good `torch.nn.functional.linear`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from temper.models.weights import Weights


def shard_module(model: nn.Module, weights: Weights, device: torch.device) -> Callable[[Tensor], Any]:
    """Fills `model` with this rank's share of `weights`, and gives its forward pass. Collective over all ranks.

    The parameters of `model` may be on the meta device: only their shapes and types count. Each rank reads its own
    range of each, 1/ranks of it; buffers are whole on every rank. In a forward pass a module's own parameters are
    gathered before it computes and released after it, so that at most those of one module and of the modules around
    it are whole. All ranks must call it equally often, each on inputs of its own.
    """
    import deepspeed  # only now, after `prepare`
    from deepspeed.runtime.zero.parameter_offload import DeepSpeedZeRoOffload

    deepspeed.init_distributed(dist_init_required=False)
    partitioner = deepspeed.zero.Init(mem_efficient_linear=False)
    partitioner.local_device = partitioner.remote_device = device
    _place_buffers(model, weights, device)
    _share_parameters(model, weights, device, partitioner)
    gathering = DeepSpeedZeRoOffload(
        model,
        timers=None,
        ds_config=None,
        overlap_comm=False,
        prefetch_bucket_size=0,
        max_reuse_distance=0,
        max_live_parameters=0,
        param_persistence_threshold=0,
    )
    # They would put a node of autograd around every module's inputs and outputs.
    for hook in gathering.backward_hooks:
        hook.remove()

    def forward(inputs: Tensor) -> Any:
        with _finding_external_parameters(model):
            return model(inputs)

    return forward


@torch.no_grad()
def _place_buffers(model: nn.Module, weights: Weights, device: torch.device) -> None:
    persistent = model.state_dict(keep_vars=True)
    for name, shape in weights.shapes.items():
        if not isinstance(persistent[name], nn.Parameter):
            persistent[name].copy_(weights.read(name).view(shape))
    placed: dict[Tensor, Tensor] = {}
    for module in model.modules():
        for name, buffer in module._buffers.items():
            if buffer is not None:
                module._buffers[name] = placed.setdefault(buffer, buffer.to(device))


def _share_parameters(model: nn.Module, weights: Weights, device: torch.device, partitioner: Any) -> None:
    """Replaces every parameter by one of which this rank holds its part."""
    state = model.state_dict(keep_vars=True)
    names = {state[name]: name for name in weights.shapes}
    shared: dict[nn.Parameter, nn.Parameter] = {}
    for module in list(model.modules()):
        for name, param in list(module._parameters.items()):
            if param is None:
                continue
            if param not in shared:
                shared[param] = _shared(param, weights, names[param], device, partitioner)
            # Not into `_parameters`: recurrent layers keep a list of their own.
            setattr(module, name, shared[param])


@torch.no_grad()
def _shared(param: nn.Parameter, weights: Weights, name: str, device: torch.device, partitioner: Any) -> nn.Parameter:
    # For a moment one parameter is whole, as it is when its module computes; its values are not those of the weights.
    made = nn.Parameter(torch.empty(param.shape, dtype=param.dtype, device=device), requires_grad=False)
    partitioner._convert_to_deepspeed_param(made)
    made.partition()  # type: ignore[attr-defined]
    part: Tensor = made.ds_tensor  # type: ignore[attr-defined]
    start = min(part.numel() * made.ds_zero_partition_rank, made.ds_numel)  # type: ignore[attr-defined]
    count = min(part.numel(), made.ds_numel - start)  # type: ignore[attr-defined]
    part[:count].copy_(weights.read(name, start, count))
    return made


@contextmanager
def _finding_external_parameters(model: nn.Module) -> Iterator[None]:
    """Within it a module may use parameters of another, e.g. a tied weight: they are gathered as they are looked up."""
    dictionaries: list[Any] = [module._parameters for module in model.modules()]
    for parameters in dictionaries:
        parameters._in_forward = True
    try:
        yield
    finally:
        for parameters in dictionaries:
            parameters._in_forward = False
