"""The student learns a teacher's levels, too: how far a level is from the teacher's, and how its loss is put into the
student's backward pass wherever the level is computed.

A level is maps (examples, channels, height, width), a sequence (examples, tokens, features) or vectors (examples,
features).
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from temper.errors import RunError
from temper.parallel.collectives import gather_from_group
from temper.parallel.image_block import ImageBlock
from temper.plan.distill import Connector, FeaturePair

# ----------------------------------------------------------------------------------------------------------- the losses


def feature_loss(kind: str, student: Tensor, teacher: Tensor, size: Sequence[int] | None = None) -> Tensor:
    """How far the student's level is from the teacher's, a mean over the examples; computed in fp32, and in fp64 where
    the levels are.

    - `mse`: the mean square of the difference (Romero et al. 2015, equation 3, per element)
    - `cosine`: the mean over the positions of 1 − the cosine between the channels of the two
    - `attention_transfer`: ‖q_S/‖q_S‖ − q_T/‖q_T‖‖², q being the sum over the channels of the squares, a value for each
      position (Zagoruyko & Komodakis 2017, equation 2, with the square of the norm)
    - `gram`: the mean square of the difference of the Gram matrices of the channels, each divided by the number of
      positions (Gatys et al. 2016, equations 3 and 4, per element)

    The shapes are equal, but for the channels in `attention_transfer` and the positions in `gram`, once the student's
    positions, or those of its attention, are brought to `size`.
    """
    student, teacher = _precise(student), _precise(teacher)
    if kind == "attention_transfer":
        student, teacher = _energy(student), _energy(teacher)
    if size is not None:
        student = resize(student, size)
    return _LOSSES[kind](student, teacher)


def _mse(student: Tensor, teacher: Tensor) -> Tensor:
    assert student.shape == teacher.shape, "what differs is connected and resized"
    return F.mse_loss(student, teacher)


def _cosine(student: Tensor, teacher: Tensor) -> Tensor:
    assert student.shape == teacher.shape, "what differs is connected and resized"
    return 1 - F.cosine_similarity(student, teacher, dim=_channel_dim(student)).mean()


def _attention_distance(student: Tensor, teacher: Tensor) -> Tensor:
    ours, theirs = F.normalize(student.flatten(1)), F.normalize(teacher.flatten(1))
    return (ours - theirs).square().sum(1).mean()


def _gram_distance(student: Tensor, teacher: Tensor) -> Tensor:
    return F.mse_loss(_gram(student), _gram(teacher))


_LOSSES: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "mse": _mse,
    "cosine": _cosine,
    "attention_transfer": _attention_distance,
    "gram": _gram_distance,
}


def _precise(level: Tensor) -> Tensor:
    return level if level.dtype == torch.float64 else level.float()


def _channel_dim(level: Tensor) -> int:
    """Channels come first in maps, and last in a sequence or a vector."""
    return 1 if level.dim() == 4 else -1


def _energy(level: Tensor) -> Tensor:
    """The sum of squares over the channels, which stay as a dimension of one."""
    return level.square().sum(_channel_dim(level), keepdim=True)


def _gram(level: Tensor) -> Tensor:
    """(examples, channels, channels)"""
    channels = level.flatten(2) if level.dim() == 4 else level.transpose(1, 2)
    return channels @ channels.transpose(1, 2) / channels.shape[2]


# ----------------------------------------------------------------------------------------------------------- connectors


def build_connectors(pairs: Sequence[FeaturePair], seed: int) -> nn.ModuleDict:
    """What is learnt of the pairs' connectors, by the pairs' indices: convolutions and linear layers, no bias, fp32.

    Their first weights are torch's own and depend on `seed` alone; the process's random state is left as it was.
    """
    with torch.random.fork_rng(devices=[]):
        # Not the student's own numbers, which begin with the same seed.
        torch.default_generator.manual_seed((seed + 0x9E3779B97F4A7C15) % 2**63)
        learnt = {str(index): _layer(pair.connector) for index, pair in enumerate(pairs)}
        return nn.ModuleDict({name: layer for name, layer in learnt.items() if layer is not None})


def _layer(connector: Connector) -> nn.Module | None:
    if connector.kind == "conv1x1":
        return nn.Conv2d(connector.inputs, connector.outputs, 1, bias=False)
    if connector.kind == "linear":
        return nn.Linear(connector.inputs, connector.outputs, bias=False)
    return None


def connect(level: Tensor, connector: Connector, learnt: nn.Module | None) -> Tensor:
    """The student's level, averaged over the positions and with the teacher's channels where the connector says so;
    `learnt` is its layer, which computes in the type of its weights."""
    if connector.pool:
        dims = (2, 3) if level.dim() == 4 else (1,)
        level = _precise(level).mean(dims)
    if learnt is not None:
        # Called as a module: ZeRO-3 gathers the weight before it, and only its type is there all the time.
        level = learnt(level.to(learnt.weight.dtype))  # type: ignore[arg-type]
    return level


def resize(level: Tensor, size: Sequence[int]) -> Tensor:
    """Maps or a sequence with other positions: adaptive average pooling along what gets shorter, linear interpolation
    along what gets longer. Products of matrices, because torch's own operations are not deterministic on a GPU."""
    if level.dim() == 3:
        return _resizing(level.shape[1], size[0], level).T @ level
    rows, columns = (_resizing(have, want, level) for have, want in zip(level.shape[2:], size, strict=True))
    return rows.T @ level @ columns


def _resizing(have: int, want: int, like: Tensor) -> Tensor:
    """(have, want): each column has what a new position takes from the old ones."""
    units = torch.eye(have, dtype=like.dtype, device=like.device).unsqueeze(0)
    resized = F.adaptive_avg_pool1d(units, want) if want <= have else F.interpolate(units, want, mode="linear")
    return resized.squeeze(0)


# ----------------------------------------------------------------------------------------------------------------- taps


class FeatureTaps:
    """Adds the feature losses to the backward pass of a student from within, by hooks on its modules: no stage of a
    pipeline but the last has a loss at hand.

    For each step :meth:`begin_step`, then for each micro-batch :meth:`feed` before its forward pass. Without that, as
    in evaluation, the student computes as if it had no taps.
    """

    def __init__(self, pairs: Sequence[FeaturePair], seed: int) -> None:
        self.pairs = tuple(pairs)
        self.connectors = build_connectors(pairs, seed)
        self.names = tuple(dict.fromkeys(pair.term for pair in pairs))
        """The terms of all pairs, wherever they are computed."""
        self._fed: dict[str, deque[Sequence[Tensor]]] = {}
        self._sums: dict[str, Tensor] = {}
        self._scale = 1.0

    def hook(self, modules: Mapping[str, nn.Module]) -> nn.ModuleDict:
        """Taps the levels among `modules`, which are this rank's by their names in the whole model, and gives the
        connectors that are needed here: they are to be trained with the modules."""
        here = {tap: modules[tap] for tap in dict.fromkeys(pair.tap for pair in self.pairs) if tap in modules}
        for tap, module in here.items():
            self._fed[tap] = deque()
            module.register_forward_hook(self._hook_of(tap))
        needed = [str(index) for index, pair in enumerate(self.pairs) if pair.tap in here]
        return nn.ModuleDict({name: layer for name, layer in self.connectors.items() if name in needed})

    def begin_step(self, scale: float) -> None:
        """`scale` is what the engine multiplies the loss of each micro-batch with: loss scale / accumulation."""
        self._scale = scale
        self._sums.clear()
        for waiting in self._fed.values():
            waiting.clear()

    def feed(self, features: Sequence[Tensor]) -> None:
        """What the teacher gives for one micro-batch, a level for each pair; micro-batches come in this order."""
        for waiting in self._fed.values():
            waiting.append(features)

    def terms(self) -> dict[str, Tensor]:
        """The weighted losses computed here, each summed over the step's micro-batches.

        Raises RunError where a micro-batch did not come to a level: those after it were compared with another one's.
        """
        missed = [tap for tap, waiting in self._fed.items() if waiting]
        if missed:
            raise RunError(
                f"distill.features: {missed[0]} of the student is not called in every pass; pair another module"
            )
        return dict(self._sums)

    def _hook_of(self, tap: str) -> Callable[[nn.Module, Any, Any], Any]:
        learnt = dict(self.connectors.items())
        pairs = [(index, pair, learnt.get(str(index))) for index, pair in enumerate(self.pairs) if pair.tap == tap]

        def hook(module: nn.Module, _: Any, output: Any) -> Any:
            if not (module.training and self._fed[tap]):
                return output
            if not torch.is_grad_enabled():
                # Its recomputation would find no level of the teacher's left.
                raise RunError(f"distill.features: {tap} of the student is checkpointed; pair a module around it")
            features = self._fed[tap].popleft()
            level = _whole(module, output)
            losses = [
                self._loss(pair, connect(level, pair.connector, own), features[index]) for index, pair, own in pairs
            ]
            loss = losses[0] if len(losses) == 1 else torch.stack(losses).sum()
            return _attach(output, loss, self._scale)

        return hook

    def _loss(self, pair: FeaturePair, student: Tensor, teacher: Tensor) -> Tensor:
        loss = pair.weight * feature_loss(pair.loss, student, teacher, pair.connector.size)
        self._sums[pair.term] = self._sums.get(pair.term, 0) + loss.detach()
        return loss


def _whole(module: nn.Module, output: Any) -> Tensor:
    """The module's output, of which this rank may have a part only."""
    if isinstance(output, ImageBlock):
        return output.whole()
    parts = getattr(module, "temper_parts", None)
    return output if parts is None else gather_from_group(output, *parts)


def _attach(output: Any, loss: Tensor, scale: float) -> Any:
    if isinstance(output, ImageBlock):
        return output.with_block(_Attach.apply(output.block, loss, scale))
    return _Attach.apply(output, loss, scale)


class _Attach(torch.autograd.Function):
    """The output, whose backward pass is that of `scale` times the loss, too."""

    @staticmethod
    def forward(ctx: Any, output: Tensor, loss: Tensor, scale: float) -> Tensor:  # type: ignore[override]
        ctx.gradient = torch.full_like(loss, scale)
        # A copy: what changes it in place must not change what the loss keeps for its backward pass.
        return output.clone()

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor, None]:  # type: ignore[override]
        return grad, ctx.gradient, None
