"""Builds a model and measures it for the plan: `python -m temper.models.probe [FOLDER …]`, question and answer in JSON.

The folders are searched for `kind: python` targets. Standard input holds what `temper.plan.probe.model_question`
gives. The last line of standard output is `{"facts": {…}}` or `{"problems": [{…}]}`; whatever the model's own code
prints goes to standard error. The model is built on the meta device, where tensors have shapes and no memory; code
that cannot do that is run on the CPU.
"""

from __future__ import annotations

import contextlib
import json
import re
import statistics
import sys
import time
import traceback
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch
from pydantic import TypeAdapter
from torch import Tensor, nn
from torch.autograd.graph import saved_tensors_hooks
from torch.nn.modules.module import register_module_forward_hook
from torch.utils._pytree import tree_leaves, tree_map
from torch.utils.flop_counter import FlopCounterMode

import temper
from temper.config.schema import ModelConfig
from temper.errors import JobError, Problem
from temper.models.build import build_model
from temper.models.sequence import Layer, is_plain_sequence, layer_sequence
from temper.parallel.groups import Group, MeshGroups
from temper.plan.facts import DataFacts
from temper.plan.probe import LayerFacts, ModelFacts, ModuleOutput, PrunableWeight, Timing, Weights, join_weights
from temper.targets import apply_target_folders

_DEVICES = ("meta", "cpu")
# Two sizes tell what grows with the batch from what does not; one example is too few for some batch norms.
_BATCHES = (2, 4)
_WARM_UP_RUNS, _TIMED_RUNS = 2, 7
_DTYPES = {"fp32": torch.float32, "tf32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}


@dataclass(frozen=True)
class _Cost:
    """Of one layer's forward pass: bytes that autograd keeps beside parameters and buffers, FLOPs, bytes of output."""

    kept: int
    flops: int
    output: int

    def per_example(self, smaller: _Cost) -> _Cost:
        """What grows with the batch, of which `smaller` is the cost of the smaller of `_BATCHES`."""
        examples = _BATCHES[1] - _BATCHES[0]
        return _Cost(
            max(self.kept - smaller.kept, 0) // examples,
            max(self.flops - smaller.flops, 0) // examples,
            max(self.output - smaller.output, 0) // examples,
        )


# ----------------------------------------------------------------------------------------------- parameters and costs


def measure(model: nn.Module, shape: tuple[int, ...], device: str, dtype: torch.dtype = torch.float32) -> ModelFacts:
    """The facts of a model for inputs of `shape` (one example), by forward passes in training mode on `device`."""
    model.train()
    (whole,), outputs = _costs([("", model)], shape, device, dtype)
    weights = _weights(model)
    logits = _logits(outputs)
    return ModelFacts(
        num_parameters=weights.num_parameters,
        num_trainable=sum(weights.sizes),
        parameter_sizes=weights.sizes,
        buffer_bytes=weights.buffer_bytes,
        activation_bytes_per_example=whole.kept,
        forward_flops_per_example=whole.flops,
        output_shape=None if logits is None or logits.dim() == 0 else tuple(logits.shape[1:]),
        layers=_layer_facts(model, shape, device, dtype, outputs),
        prunable=prunable_weights(model),
        outputs=module_outputs(model, shape, device, dtype),
        weight_shapes={name: tuple(tensor.shape) for name, tensor in model.state_dict().items()},
    )


def _layer_facts(
    model: nn.Module, shape: tuple[int, ...], device: str, dtype: torch.dtype, expected: Any
) -> tuple[LayerFacts, ...]:
    """Of each layer, where the model is a sequence; `expected` are the model's own outputs."""
    layers = layer_sequence(model)
    if layers is None:
        return ()
    try:
        costs, outputs = _costs(layers, shape, device, dtype)
    except Exception as error:  # the model's own code may raise anything
        raise JobError([_layers_problem(model, f"cannot be applied one after the other: {_said(error)}")]) from error
    if _shapes(outputs) != _shapes(expected):
        rule = f"give outputs of the shape {_shapes(outputs)}, the model itself {_shapes(expected)}"
        raise JobError([_layers_problem(model, rule)])
    return tuple(
        LayerFacts(name, _weights(layer), None, cost.flops, cost.kept, cost.output)
        for (name, layer), cost in zip(layers, costs, strict=True)
    )


def _layers_problem(model: nn.Module, rule: str) -> Problem:
    remedy = "make pipeline_layers give what the model's forward applies"
    return Problem("model", type(model).__name__, f"has layers that {rule}", remedy)


def _shapes(outputs: Any) -> list[list[int]]:
    return [list(tensor.shape) for tensor in _tensors(outputs)]


def _costs(layers: Sequence[Layer], shape: tuple[int, ...], device: str, dtype: torch.dtype) -> tuple[list[_Cost], Any]:
    """What each layer costs for one example, and the last one's outputs."""
    (small, _), (large, outputs) = (_forward(layers, _zeros(batch, shape, device, dtype)) for batch in _BATCHES)
    return [cost.per_example(smaller) for cost, smaller in zip(large, small, strict=True)], outputs


def _zeros(examples: int, shape: tuple[int, ...], device: str, dtype: torch.dtype) -> Tensor:
    return torch.zeros((examples, *shape), device=device, dtype=dtype)


def _forward(layers: Sequence[Layer], inputs: Any) -> tuple[list[_Cost], Any]:
    """Apply the layers one after the other; what two of them keep counts for the first."""
    seen = {_storage_id(tensor) for _, layer in layers for tensor in (*layer.parameters(), *layer.buffers())}
    kept: list[torch.UntypedStorage] = []

    def keep(tensor: Tensor) -> Tensor:
        if _storage_id(tensor) not in seen:
            seen.add(_storage_id(tensor))
            kept.append(tensor.untyped_storage())
        return tensor

    costs = []
    for _, layer in layers:
        counter, before = FlopCounterMode(display=False), len(kept)
        with counter, saved_tensors_hooks(keep, lambda tensor: tensor):
            inputs = layer(inputs)
        bytes_kept = sum(storage.nbytes() for storage in kept[before:])
        costs.append(_Cost(bytes_kept, counter.get_total_flops(), sum(map(_num_bytes, _tensors(inputs)))))
    return costs, inputs


def _storage_id(tensor: Tensor) -> int:
    """The same for all views of one tensor, also on the meta device, where every address is 0."""
    return int(tensor.untyped_storage()._cdata)


def _num_bytes(tensor: Tensor) -> int:
    return tensor.numel() * tensor.element_size()


def _tensors(outputs: Any) -> list[Tensor]:
    return [leaf for leaf in tree_leaves(outputs) if isinstance(leaf, Tensor)]


def _logits(outputs: Any) -> Tensor | None:
    if isinstance(outputs, Tensor):
        return outputs
    logits = outputs.get("logits") if isinstance(outputs, Mapping) else getattr(outputs, "logits", None)
    return logits if isinstance(logits, Tensor) else None


def _weights(module: nn.Module, prefix: str = "") -> Weights:
    """What the module holds; with a prefix, only of its part of this dotted name."""

    def inside(name: str) -> bool:
        return not prefix or name.startswith(f"{prefix}.")

    parameters = [parameter for name, parameter in module.named_parameters() if inside(name)]
    return Weights(
        num_parameters=sum(parameter.numel() for parameter in parameters),
        sizes=tuple(parameter.numel() for parameter in parameters if parameter.requires_grad),
        buffer_bytes=sum(_num_bytes(buffer) for name, buffer in module.named_buffers() if inside(name)),
    )


# ------------------------------------------------------------------------------------------------------------- outputs


def module_outputs(
    model: nn.Module, shape: tuple[int, ...], device: str, dtype: torch.dtype = torch.float32
) -> tuple[ModuleOutput, ...]:
    """What the modules inside the model give for inputs of `shape` (one example), in the order of their last outputs;
    those that a forward pass does not call are left out."""
    small, large = (_outputs(model, _zeros(batch, shape, device, dtype)) for batch in _BATCHES)
    names = {module: name for name, module in model.named_modules()}
    return tuple(
        ModuleOutput(
            name=names[module],
            kind=type(module).__name__,
            shape=_example_shape(small[module][-1], outputs[-1]),
            calls=len(outputs),
            last=names[_last_of(module)] if is_plain_sequence(module) else None,
        )
        for module, outputs in large.items()
        if names.get(module)
    )


def _outputs(model: nn.Module, inputs: Tensor) -> dict[nn.Module, list[tuple[int, ...] | None]]:
    """The shapes of what each module gave, None for what is no tensor of floats; in the order of the last outputs."""
    given: dict[nn.Module, list[tuple[int, ...] | None]] = {}

    def note(module: nn.Module, _: Any, output: Any) -> None:
        is_floats = isinstance(output, Tensor) and output.is_floating_point()
        given[module] = [*given.pop(module, []), tuple(output.shape) if is_floats else None]

    # Of all modules at once: a module with a hook of its own is no longer cut.
    hook = register_module_forward_hook(note)
    try:
        with torch.no_grad():
            model(inputs)
    finally:
        hook.remove()
    return given


def _example_shape(small: tuple[int, ...] | None, large: tuple[int, ...] | None) -> tuple[int, ...] | None:
    """From the shapes for the two of `_BATCHES`; None where anything but the first dimension grew with the batch."""
    if not small or not large or len(large) < 2 or (small[0], large[0]) != _BATCHES or small[1:] != large[1:]:
        return None
    return large[1:]


def _last_of(module: nn.Module) -> nn.Module:
    """The module whose output is that of an nn.Sequential, which may end with another one."""
    return _last_of(module[-1]) if is_plain_sequence(module) and len(module) else module  # type: ignore[arg-type, index]


# ------------------------------------------------------------------------------------------------------------ prunable

_NORMS = (nn.modules.batchnorm._NormBase, nn.LayerNorm, nn.GroupNorm, nn.RMSNorm)
_EMBEDDINGS = (nn.Embedding, nn.EmbeddingBag)
# Libraries and users have norms and embeddings of their own, e.g. LlamaRMSNorm, LayerNorm2d, PositionalEmbedding.
_NEVER_PRUNED = re.compile(r"(Norm(\d+d)?|Embedding)$")
# weight_ih_l0 of an LSTM, in_proj_weight of nn.MultiheadAttention. weight_g is the length in torch's weight_norm.
_WEIGHT = re.compile(r"^weight(?!_g$)|_weight$")
_LAYER_KINDS: tuple[tuple[str, tuple[type[nn.Module], ...]], ...] = (
    ("transposed", (nn.modules.conv._ConvTransposeNd,)),
    ("convolution", (nn.modules.conv._ConvNd,)),
    ("linear", (nn.Linear, nn.Bilinear)),
    ("recurrent", (nn.RNNBase, nn.RNNCellBase)),
)


def prunable_weights(model: nn.Module) -> tuple[PrunableWeight, ...]:
    """The trainable weights of at least two dimensions that make up a layer's sums, in the model's order.

    They are told by their own name, which begins with `weight` or ends in `_weight`, so that layers of a user's own
    count, too. Biases and the weights of norms and embeddings are none, nor is what a layer shares with one of these,
    as an output layer does with its tied embedding.
    """
    places: dict[nn.Parameter, list[tuple[str, nn.Module]]] = {}
    for module in model.modules():
        for name, parameter in module.named_parameters(recurse=False):
            places.setdefault(parameter, []).append((name, module))
    return tuple(
        PrunableWeight(name, tuple(parameter.shape), _layer_kind(places[parameter]))
        for name, parameter in model.named_parameters()
        if parameter.requires_grad and parameter.dim() >= 2 and _is_layers(places[parameter])
    )


def _is_layers(places: Sequence[tuple[str, nn.Module]]) -> bool:
    return any(_WEIGHT.search(name) for name, _ in places) and not any(
        isinstance(module, (*_NORMS, *_EMBEDDINGS)) or _NEVER_PRUNED.search(type(module).__name__)
        for _, module in places
    )


def _layer_kind(places: Sequence[tuple[str, nn.Module]]) -> str:
    # The linear layer of transformers' GPT-2 has its inputs first, as a transposed convolution has.
    if any(type(module).__name__ == "Conv1D" for _, module in places):
        return "transposed"
    kinds = (kind for _, module in places for kind, classes in _LAYER_KINDS if isinstance(module, classes))
    return next(kinds, "other")


# ---------------------------------------------------------------------------------------------------- tensor parallel


def with_parts(
    facts: ModelFacts, model: nn.Module, inputs: Tensor, size: int, patterns: Mapping[str, str]
) -> ModelFacts:
    """The facts with the splits of the model over `size` tensor ranks and what the first of them holds.

    Splits the model in place; `inputs` are a batch of examples. Raises JobError where a pattern fits no layer or a
    layer cannot be split so.
    """
    from temper.parallel.blocks import dry_run_on_blocks
    from temper.parallel.split import apply_split, resolve_split

    splits = resolve_split(model, patterns, size)
    blocks = [name for name, kind in splits.items() if kind == "image_blocks"]
    refused = dry_run_on_blocks(model, blocks, inputs, size) if blocks else None
    if refused is not None:
        raise JobError([Problem("parallel.split", "image_blocks", f"cannot compute this model: {refused}")])
    tensor = Group(0, size)
    apply_split(model, splits, MeshGroups(data=Group(), tensor=tensor, pipeline=Group(), stage=tensor, replica=tensor))
    # By name: splitting changes modules, and may make one layer of several, but parameters keep their names.
    layers = tuple(_with_part(facts.layers, model, name) for name, _ in layer_sequence(model) or ())
    return replace(facts, layers=layers, splits=dict(splits), part=_weights(model))


def _with_part(layers: Sequence[LayerFacts], model: nn.Module, name: str) -> LayerFacts:
    """The layer `name` of the split model, from the facts of those that it is made of."""
    parts = [layer for layer in layers if layer.name == name or layer.name.startswith(f"{name}.")]
    seconds = [layer.seconds for layer in parts if layer.seconds is not None]
    return LayerFacts(
        name=name,
        weights=join_weights([layer.weights for layer in parts]),
        part=_weights(model, name),
        forward_flops=sum(layer.forward_flops for layer in parts),
        activation_bytes=sum(layer.activation_bytes for layer in parts),
        output_bytes=parts[-1].output_bytes,
        seconds=sum(seconds) if seconds else None,
    )


# -------------------------------------------------------------------------------------------------------------- times


def with_times(facts: ModelFacts, model: nn.Module, inputs: Tensor, timing: Timing) -> ModelFacts:
    """The facts with each layer's seconds for one example, forward and backward: the median of several runs.

    `model` lies on the timing's device; `inputs` are a batch of examples there.
    """
    layers = layer_sequence(model)
    assert layers is not None, "facts with layers are of a model that is a sequence"
    synchronize = torch.cuda.synchronize if timing.device == "cuda" else _nothing
    runs = [_time_layers(layers, inputs, synchronize) for _ in range(_WARM_UP_RUNS + _TIMED_RUNS)]
    medians = [statistics.median(seconds) for seconds in zip(*runs[_WARM_UP_RUNS:], strict=True)]
    timed = zip(facts.layers, medians, strict=True)
    return replace(facts, layers=tuple(replace(layer, seconds=median / len(inputs)) for layer, median in timed))


def _time_layers(layers: Sequence[Layer], inputs: Any, synchronize: Callable[[], None]) -> list[float]:
    """Seconds of each layer's forward and backward pass, the layers fed as in a pipeline of one layer a stage."""
    seconds = []
    for index, (_, layer) in enumerate(layers):
        spent, inputs = _time_layer(layer, inputs, index > 0, synchronize)
        seconds.append(spent)
    return seconds


def _time_layer(
    layer: nn.Module, inputs: Any, needs_gradient: bool, synchronize: Callable[[], None]
) -> tuple[float, Any]:
    """Seconds of a forward and a backward pass, and the outputs."""
    leaves = tree_map(lambda value: _as_leaf(value, needs_gradient), inputs)
    # A copy, since a layer may work in place, which autograd forbids on a leaf.
    fed = tree_map(lambda value: value.clone() if isinstance(value, Tensor) else value, leaves)
    wanted = [tensor for tensor in (*_tensors(leaves), *layer.parameters()) if tensor.requires_grad]
    synchronize()
    start = time.perf_counter()
    outputs = layer(fed)
    roots = [tensor for tensor in _tensors(outputs) if tensor.requires_grad]
    if roots:
        torch.autograd.grad(roots, wanted, [torch.ones_like(root) for root in roots], allow_unused=True)
    synchronize()
    return time.perf_counter() - start, outputs


def _as_leaf(value: Any, needs_gradient: bool) -> Any:
    if not isinstance(value, Tensor):
        return value
    return value.detach().requires_grad_(needs_gradient and value.is_floating_point())


def _nothing() -> None:
    """On the CPU a call returns when its work is done."""


# ------------------------------------------------------------------------------------------------ question and answer


def answer(question: dict[str, Any]) -> dict[str, Any]:
    """`{"facts": …}` for a model that works on one of the devices, else `{"problems": …}` of the last one tried."""
    config: ModelConfig = TypeAdapter(ModelConfig).validate_python(question["model"])
    data = _data_facts(question)
    try:
        model, inputs, facts = _examine(config, data)
        if question["timing"] is not None and facts.layers:
            section = {key: value for key, value in question["timing"].items() if key != "machine"}
            facts = _timed(facts, config, data, inputs.dtype, Timing(**section))
        if question["tensor"] is not None:
            facts = with_parts(facts, model, inputs, question["tensor"]["size"], dict(question["tensor"]["split"]))
        return {"facts": asdict(facts)}
    except JobError as error:
        return {"problems": [asdict(problem) for problem in error.problems]}


def _examine(config: ModelConfig, data: DataFacts) -> tuple[nn.Module, Tensor, ModelFacts]:
    """The model, inputs that it takes, which are floats or else token ids, and its facts."""
    # What has three dimensions is an image.
    dtypes = (torch.float32,) if len(data.shape) == 3 else (torch.float32, torch.int64)
    for device in _DEVICES:
        try:
            with torch.device(device):
                model = build_model(config, data, 0)
        except JobError:
            raise
        except Exception as error:  # the model's own code may raise anything
            problem = _problem(config, "cannot be built", [error])
            continue
        errors = []
        for dtype in dtypes:
            try:
                facts = measure(model, data.shape, device, dtype)
                return model, _zeros(_BATCHES[0], data.shape, device, dtype), facts
            except JobError:
                raise
            except Exception as error:
                errors.append(error)
        problem = _problem(config, f"does not take an input of the shape {(_BATCHES[0], *data.shape)}", errors)
    raise JobError([problem])


def _timed(facts: ModelFacts, config: ModelConfig, data: DataFacts, dtype: torch.dtype, timing: Timing) -> ModelFacts:
    """The facts with seconds, measured on a model with memory of its own."""
    torch.set_num_threads(timing.threads)
    compute = _DTYPES[timing.dtype]
    shape = (timing.examples, *data.shape)
    try:
        with torch.device(timing.device):
            model = build_model(config, data, 0).to(compute).train()
            inputs = torch.randn(shape, dtype=compute) if dtype.is_floating_point else torch.zeros(shape, dtype=dtype)
        return with_times(facts, model, inputs, timing)
    except Exception as error:  # the model's own code may raise anything
        problem = _problem(config, "cannot be timed", [error])
        raise JobError([replace(problem, key="parallel.stages", value="measured", remedy="use derived")]) from error


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


def _problem(config: ModelConfig, rule: str, errors: Sequence[Exception]) -> Problem:
    """With two errors the second one is of token ids as inputs."""
    value = getattr(config, "target", None) or getattr(config, "name", config.kind)
    return Problem("model", value, f"{rule}: " + "; as token ids: ".join(map(_said, errors)))


def _said(error: Exception) -> str:
    lines = str(error).strip().splitlines()
    return f"{type(error).__name__}{': ' if lines else ''}{' '.join(lines[:3])}{_place(error)}"


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
