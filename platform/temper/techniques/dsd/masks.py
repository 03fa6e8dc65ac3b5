"""Which weights a sparse phase prunes: a pure function of a layer's whole fp32 weight.

The paper (Han et al. 2017, section 3, "sparse training") prunes in each layer the weights of smallest magnitude:
k = N·(1 − sparsity) are kept. Here exactly round(N·sparsity) are pruned, and of weights of the same magnitude the
first ones in memory order, so that whoever computes a mask computes the same one.
"""

from __future__ import annotations

import hashlib

import torch
from torch import Tensor

from temper.plan.dsd import groups_of, num_pruned
from temper.plan.phases import Pruning


def select_mask(name: str, weight: Tensor, pruning: Pruning) -> Tensor:
    """The mask of one layer, of its shape: true where a weight is kept.

    `weight` is the whole fp32 weight of layer `name`, `(outputs, inputs, …)`. The structures:

    - `weights`: round(N·share) of all N weights are pruned.
    - `channels`: round(outputs·share) of the slices along the first dimension, those of smallest norm.
    - `N:M`: in every M weights in a row along the second dimension all but the N largest (Mishra et al. 2021).
    """
    scores = _scores(name, weight.detach().float().cpu(), pruning)
    if pruning.structure == "weights":
        return _keep_largest(scores.flatten(), pruning.layers[name]).view(weight.shape)
    if pruning.structure == "channels":
        kept = _keep_largest(torch.linalg.vector_norm(scores.flatten(1), dim=1), pruning.layers[name])
        return kept.view(-1, *[1] * (weight.dim() - 1)).expand(weight.shape).contiguous()
    return _keep_in_groups(scores, *groups_of(pruning.structure))


def _scores(name: str, weight: Tensor, pruning: Pruning) -> Tensor:
    if pruning.criterion == "magnitude":
        return weight.abs()
    digest = hashlib.blake2b(f"{pruning.seed}/{name}".encode(), digest_size=7).digest()
    generator = torch.Generator().manual_seed(int.from_bytes(digest, "big"))
    return torch.rand(weight.shape, generator=generator, dtype=torch.float64)


def _keep_largest(scores: Tensor, share: float) -> Tensor:
    """False for the round(N·share) smallest of the flat `scores`, of equal ones for the first."""
    pruned = num_pruned(len(scores), share)
    if pruned == 0:
        return torch.ones(len(scores), dtype=torch.bool)
    threshold = scores.kthvalue(pruned).values
    kept = scores >= threshold
    ties = (scores == threshold).nonzero().flatten()
    kept[ties[: pruned - int((~kept).sum())]] = False
    return kept


def _keep_in_groups(scores: Tensor, kept: int, group: int) -> Tensor:
    """True for the `kept` largest of every `group` along the second dimension; of equal ones the first are pruned."""
    rows = scores.movedim(1, -1)
    groups = rows.reshape(*rows.shape[:-1], -1, group)
    # A stable ascending sort puts the first of equals first, where pruning begins.
    order = groups.sort(dim=-1, stable=True).indices
    mask = torch.ones_like(groups, dtype=torch.bool).scatter_(-1, order[..., : group - kept], False)
    return mask.reshape(rows.shape).movedim(-1, 1).contiguous()
