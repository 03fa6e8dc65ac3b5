"""Which levels of two networks belong together: `distill.features: auto`.

Told from names, shapes and weights alone, in the order of the forward pass, in one of three ways: that which pairs most
levels, the first of those that pair equally many.

- Stages of images: a stage is a run of modules whose maps have one size and among which something is learnt; its level
  is what the last of them gives (the hints of Romero et al. 2015 and the attention of Zagoruyko & Komodakis 2017 are
  taken there). A first stage of a single layer before stages of several is a stem and left out. Stages with maps of the
  same size are paired; where there are none, all in their order, the last with the last.
- Blocks of a sequence model: modules of one class and shape side by side, paired uniformly (Jiao et al. 2020, TinyBERT,
  section 3.1).
- Hidden layers: each learnt layer with the activation after it, paired uniformly.

The last learnt layer, where it gives the outputs, and what follows it are no levels: the soft targets teach these.
"""

from __future__ import annotations

import itertools
import math
from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

from temper.plan.probe import ModelFacts, ModuleOutput

Names = tuple[str, str]
"""Of a module of the student and one of the teacher."""


def pair_levels(student: ModelFacts, teacher: ModelFacts) -> tuple[Names, ...]:
    """Levels of the student, each with that of the teacher which it can learn from; none where nothing is alike."""
    bodies = _body(student), _body(teacher)
    found = [way(*bodies) for way in _WAYS]
    return tuple((ours.name, theirs.name) for ours, theirs in max(found, key=len))


# ----------------------------------------------------------------------------------------------------- a network's body


@dataclass(frozen=True)
class _Piece:
    """A module that counts as one: a layer, or a block of layers; `weights` is how many of its weights are learnt."""

    output: ModuleOutput
    weights: int
    is_leaf: bool

    @property
    def shape(self) -> tuple[int, ...]:
        return self.output.shape or ()

    @property
    def is_usable(self) -> bool:
        """Pooling ends no stage. What dropout gives is noise that a teacher, which is in evaluation mode, has not."""
        return self.output.calls == 1 and not any(kind in self.output.kind for kind in ("Dropout", "Pool"))


@dataclass(frozen=True)
class _Body:
    """A network without its output layer: all outputs, and the pieces, in the order of the forward pass."""

    outputs: Sequence[ModuleOutput]
    pieces: Sequence[_Piece]

    def level(self, piece: _Piece) -> ModuleOutput:
        """The outermost nn.Sequential that ends with the piece, else the piece itself: `layer3` for `layer3.2`."""
        same = (output for output in self.outputs if output.tap == piece.output.tap)
        return min(same, key=lambda output: output.name.count("."))


def _body(facts: ModelFacts) -> _Body:
    pieces = _pieces(facts)
    last = next((piece for piece in reversed(pieces) if piece.weights), None)
    if last is None or not facts.output_shape or _channels(last.shape) != facts.output_shape[-1]:
        return _Body(facts.outputs, pieces)
    name = last.output.name
    first = next(index for index, output in enumerate(facts.outputs) if _is_inside(output.name, name))
    return _Body(facts.outputs[:first], pieces[: pieces.index(last)])


def _pieces(facts: ModelFacts) -> list[_Piece]:
    """The outermost modules that are not opened; opened are an nn.Sequential and a whole trunk."""
    inside: dict[str, list[ModuleOutput]] = defaultdict(list)
    for output in facts.outputs:
        for name in (*_around(output.name), output.name):
            inside[name].append(output)
    opened = {output.name for output in facts.outputs if output.kind == "Sequential" or _is_trunk(inside[output.name])}
    called = {output.name for output in facts.outputs}
    return [
        _Piece(
            output,
            sum(_is_inside(weight.module, output.name) for weight in facts.prunable),
            is_leaf=len(inside[output.name]) == 1,
        )
        for output in facts.outputs
        if output.name not in opened and called.intersection(_around(output.name)) <= opened
    ]


def _is_trunk(outputs: Sequence[ModuleOutput]) -> bool:
    """Whether the maps among the outputs get smaller twice; in a block they do so once at most."""
    maps = (output.shape for output in outputs if output.shape and len(output.shape) == 3)
    # But for single values, from which gates for the channels are computed.
    sizes = {(height, width) for _, height, width in maps} - {(1, 1)}
    smallest = min(sizes, default=(0, 0), key=math.prod)
    return sum(height > smallest[0] and width > smallest[1] for height, width in sizes) > 1


def _around(name: str) -> list[str]:
    """The dotted names of the modules that a module lies in."""
    parts = name.split(".")
    return [".".join(parts[:depth]) for depth in range(1, len(parts))]


def _is_inside(name: str, outer: str) -> bool:
    return name == outer or name.startswith(f"{outer}.")


def _channels(shape: tuple[int, ...]) -> int | None:
    return (shape[0] if len(shape) == 3 else shape[-1]) if shape else None


# ------------------------------------------------------------------------------------------------------ the three ways

_Pairs = list[tuple[ModuleOutput, ModuleOutput]]


def _pair_stages(student: _Body, teacher: _Body) -> _Pairs:
    ours, theirs = _stages(student), _stages(teacher)
    same = [(level, theirs[size]) for size, level in ours.items() if size in theirs]
    fewer = min(len(ours), len(theirs))
    return same or list(zip(list(ours.values())[-fewer:], list(theirs.values())[-fewer:], strict=True)) if fewer else []


def _stages(body: _Body) -> Mapping[tuple[int, ...], ModuleOutput]:
    """The level of each stage by the (height, width) of its maps."""
    maps = [piece for piece in body.pieces if len(piece.shape) == 3]
    runs = [(size, list(run)) for size, run in itertools.groupby(maps, key=lambda piece: piece.shape[1:])]
    weights = [sum(piece.weights for piece in run) for _, run in runs]
    learnt = [run for run, count in zip(runs, weights, strict=True) if count]
    first, *later = [count for count in weights if count] or [0]
    if first == 1 and later and min(later) > 1:
        learnt = learnt[1:]
    levels = {size: [piece for piece in run if piece.is_usable] for size, run in learnt}
    return {size: body.level(usable[-1]) for size, usable in levels.items() if usable}


def _pair_blocks(student: _Body, teacher: _Body) -> _Pairs:
    return _uniform(_blocks(student), _blocks(teacher))


def _blocks(body: _Body) -> list[ModuleOutput]:
    """The largest family of modules with modules inside that give sequences; of equally large ones the outermost."""
    containers = {outer for output in body.outputs for outer in _around(output.name)}
    families: dict[tuple[object, ...], list[ModuleOutput]] = defaultdict(list)
    for output in body.outputs:
        if output.name in containers and output.shape and len(output.shape) == 2 and output.calls == 1:
            families[(output.name.rpartition(".")[0], output.kind, output.shape)].append(output)
    # From the back: what stands alone before a single block, such as an embedding, is no block.
    later_first = reversed(families.values())
    return max(later_first, key=lambda family: (len(family), -family[0].name.count(".")), default=[])


def _pair_hidden(dims: int) -> Callable[[_Body, _Body], _Pairs]:
    return lambda student, teacher: _uniform(_hidden(student, dims), _hidden(teacher, dims))


def _hidden(body: _Body, dims: int) -> list[ModuleOutput]:
    """What each learnt layer gives, after the norm and the activation that follow it; `dims` is 1 for vectors."""
    layers: list[_Piece] = []
    for piece in (piece for piece in body.pieces if len(piece.shape) == dims and piece.is_usable):
        if piece.weights:
            layers.append(piece)
        elif layers and layers[-1].is_leaf and piece.is_leaf and piece.shape == layers[-1].shape:
            layers[-1] = piece
    return [body.level(piece) for piece in layers]


def _uniform(ours: Sequence[ModuleOutput], theirs: Sequence[ModuleOutput]) -> _Pairs:
    """Level i of the n of the shallower network, counted from 1, with level ⌈i·m/n⌉ of the m of the deeper one."""
    number = min(len(ours), len(theirs))
    return [
        (ours[-(-index * len(ours) // number) - 1], theirs[-(-index * len(theirs) // number) - 1])
        for index in range(1, number + 1)
    ]


_WAYS = (_pair_stages, _pair_blocks, _pair_hidden(2), _pair_hidden(1))
