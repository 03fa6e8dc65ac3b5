"""The job file's schema: every key that a user can write, its type, range, default and meaning.

A job holds values, never code: the one way to name code is `kind: python, target: module:function`.
`json_schema()` gives editors completion and checking; a test keeps `jobs/job.schema.json` equal to it, and
`python -m temper.config.schema > jobs/job.schema.json` refreshes it.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, field_validator

from temper.storage import storage_folder

Name = Annotated[str, Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9_.-]{0,99}$")]
Target = Annotated[
    str,
    Field(
        pattern=r"^[A-Za-z_]\w*(\.[A-Za-z_]\w*)*:[A-Za-z_]\w*$",
        description="`module:function`, importable from the folder of the job or the working directory",
    ),
]
Positive = Annotated[int, Field(gt=0, le=2**40)]
NonNegative = Annotated[int, Field(ge=0, le=2**40)]
Fraction = Annotated[float, Field(ge=0.0, lt=1.0)]
PositiveFloat = Annotated[float, Field(gt=0.0, allow_inf_nan=False)]
NonNegativeFloat = Annotated[float, Field(ge=0.0, allow_inf_nan=False)]
Pixels = Annotated[int, Field(gt=0, le=4096)]


class Section(BaseModel):
    """Base of every section: unknown keys are errors, values are not coerced, nothing changes after loading."""

    model_config = ConfigDict(extra="forbid", frozen=True, strict=True, protected_namespaces=())


# ---------------------------------------------------------------------------------------------------------- model


class TorchvisionModel(Section):
    """A torchvision classifier by the name of its builder, e.g. `resnet18`; trained from scratch."""

    kind: Literal["torchvision"]
    name: Name
    num_classes: Positive | None = Field(None, description="default: the data set's number of classes")
    args: dict[str, Any] = Field(default_factory=dict, description="further keyword arguments of the builder")


class ResNetModel(Section):
    """CIFAR-style ResNet (He et al. 2016, section 4.2): three stages of 16, 32, 64 maps times `width`."""

    kind: Literal["resnet"]
    depth: Literal[8, 14, 20, 32, 44, 56, 110] = 20
    width: Annotated[float, Field(gt=0, le=16)] = 1.0
    num_classes: Positive | None = Field(None, description="default: the data set's number of classes")


class MLPModel(Section):
    """Fully connected network on the flattened input, ReLU between layers."""

    kind: Literal["mlp"]
    hidden: list[Positive] = Field(default_factory=lambda: [256, 256], max_length=64)
    dropout: Fraction = 0.0
    num_classes: Positive | None = Field(None, description="default: the data set's number of classes")


class CNNModel(Section):
    """Small convolutional network: 3×3 convolution, ReLU and 2×2 max-pooling for each entry of `channels`."""

    kind: Literal["cnn"]
    channels: list[Positive] = Field(default_factory=lambda: [16, 32], min_length=1, max_length=16)
    hidden: Positive = 128
    dropout: Fraction = 0.0
    num_classes: Positive | None = Field(None, description="default: the data set's number of classes")


class GPTModel(Section):
    """Decoder-only transformer (Radford et al. 2019): pre-norm blocks, learnt positions, separate output layer.

    Takes token ids `(examples, tokens)` and gives logits `(examples, tokens, vocabulary)`.
    """

    kind: Literal["gpt"]
    layers: Annotated[int, Field(gt=0, le=1024)] = 4
    heads: Annotated[int, Field(gt=0, le=1024)] = 4
    width: Positive = 128
    dropout: Fraction = 0.0
    num_classes: Positive | None = Field(None, description="vocabulary; default: the data set's number of classes")


class TransformersModel(Section):
    """Any `transformers` architecture from its configuration, with random weights (needs the extra `transformers`)."""

    kind: Literal["transformers"]
    auto_class: Literal[
        "AutoModelForImageClassification",
        "AutoModelForSequenceClassification",
        "AutoModelForCausalLM",
        "AutoModelForMaskedLM",
    ]
    model_type: Name = Field(description="the architecture's `model_type`, e.g. `vit`, `bert`, `gpt2`")
    args: dict[str, Any] = Field(default_factory=dict, description="fields of the architecture's config")


class PythonModel(Section):
    """A model of one's own: `target(**args)` returns a `torch.nn.Module`."""

    kind: Literal["python"]
    target: Target
    args: dict[str, Any] = Field(default_factory=dict)


ModelConfig = Annotated[
    TorchvisionModel | ResNetModel | MLPModel | CNNModel | GPTModel | TransformersModel | PythonModel,
    Field(discriminator="kind"),
]

# ----------------------------------------------------------------------------------------------------------- data


class RandomCrop(Section):
    """Pad by `padding` on each side and cut a random window of `size` (default: the image's own size)."""

    kind: Literal["random_crop"]
    padding: NonNegative = 0
    size: Pixels | None = None


class RandomHorizontalFlip(Section):
    kind: Literal["random_horizontal_flip"]
    p: Annotated[float, Field(ge=0.0, le=1.0)] = 0.5


class RandomRotation(Section):
    kind: Literal["random_rotation"]
    degrees: Annotated[float, Field(gt=0.0, le=180.0)]


class RandomAffine(Section):
    kind: Literal["random_affine"]
    degrees: Annotated[float, Field(ge=0.0, le=180.0)] = 0.0
    translate: Fraction = Field(0.0, description="largest shift, as a share of the image's side")
    scale: Fraction = Field(0.0, description="largest relative change of size, up or down")


class RandomResizedCrop(Section):
    kind: Literal["random_resized_crop"]
    size: Pixels
    min_scale: Annotated[float, Field(gt=0.0, le=1.0)] = 0.08


class RandomErasing(Section):
    kind: Literal["random_erasing"]
    p: Annotated[float, Field(ge=0.0, le=1.0)] = 0.5


class ColorJitter(Section):
    kind: Literal["color_jitter"]
    brightness: NonNegativeFloat = 0.0
    contrast: NonNegativeFloat = 0.0
    saturation: NonNegativeFloat = 0.0


class TrivialAugment(Section):
    """TrivialAugment, wide (Müller and Hutter 2021)."""

    kind: Literal["trivial_augment"]


class Resize(Section):
    """Resize the shorter side to `size`."""

    kind: Literal["resize"]
    size: Pixels


class CenterCrop(Section):
    kind: Literal["center_crop"]
    size: Pixels


Transform = Annotated[
    RandomCrop
    | RandomHorizontalFlip
    | RandomRotation
    | RandomAffine
    | RandomResizedCrop
    | RandomErasing
    | ColorJitter
    | TrivialAugment
    | Resize
    | CenterCrop,
    Field(discriminator="kind"),
]
FixedTransform = Annotated[Resize | CenterCrop, Field(discriminator="kind")]


class Normalize(Section):
    """(x − mean) / std per channel, on values scaled to 0…1."""

    mean: list[Annotated[float, Field(allow_inf_nan=False)]] = Field(min_length=1, max_length=16)
    std: list[PositiveFloat] = Field(min_length=1, max_length=16)


class DataSection(Section):
    """What all kinds of data have in common."""

    global_batch: Positive = Field(description="examples in one optimizer step, over all ranks")
    holdout: NonNegative = Field(0, description="training examples held out for the evaluation during training")
    augment: list[Transform] = Field(default_factory=list, description="training only, seeded per example")
    eval_transforms: list[FixedTransform] = Field(default_factory=list)
    normalize: Normalize | None = Field(None, description="default: the data set's own mean and deviation")
    labels: Annotated[float, Field(ge=0.0, le=1.0)] = Field(
        1.0,
        description="share of the training examples, drawn by the seed, that have a label. The others are there for "
        "distillation only: without it they are left out",
    )
    omit_classes: list[NonNegative] = Field(
        default_factory=list, description="classes of which no example is trained on; epochs are counted with them"
    )
    loader_processes: Annotated[int, Field(ge=0, le=256)] = Field(
        0, description="processes per rank that prepare batches ahead; 0 prepares them in the rank itself"
    )


class DigitsData(DataSection):
    """scikit-learn's handwritten digits: 1,437 + 360 images of 8×8, no download."""

    kind: Literal["digits"]


class MNISTData(DataSection):
    kind: Literal["mnist"]


class FashionMNISTData(DataSection):
    kind: Literal["fashion_mnist"]


class CIFAR10Data(DataSection):
    kind: Literal["cifar10"]


class ImageFolderData(DataSection):
    """`path/train/<class>/<image>` and `path/test/<class>/<image>`."""

    kind: Literal["image_folder"]
    path: Annotated[str, Field(min_length=1)]


class ParquetData(DataSection):
    """Parquet files in `path/train` and `path/test` with an encoded image and an integer label in each row."""

    kind: Literal["parquet"]
    path: Annotated[str, Field(min_length=1)]
    image_column: str = "image"
    label_column: str = "label"
    num_classes: Positive


class WebDatasetData(DataSection):
    """WebDataset shards `path/train/*.tar`, `path/test/*.tar` with an image and a class index per sample."""

    kind: Literal["webdataset"]
    path: Annotated[str, Field(min_length=1)]
    image_key: str = "jpg"
    label_key: str = "cls"
    num_classes: Positive


class SyntheticData(DataSection):
    """Random class prototypes plus noise, made from the seed: for benchmarks and tests, learnable but not real."""

    kind: Literal["synthetic"]
    shape: list[Positive] = Field(default_factory=lambda: [3, 32, 32], min_length=1, max_length=4)
    num_classes: Positive = 10
    train_examples: Positive = 10_000
    test_examples: Positive = 1_000
    noise: NonNegativeFloat = 1.0


class PythonData(DataSection):
    """Data of one's own: `target(split, **args)` returns a map-style data set of `(input, target)` pairs.

    `split` is `train` or `test`; inputs and targets are tensors, arrays or numbers of one shape.
    """

    kind: Literal["python"]
    target: Target
    args: dict[str, Any] = Field(default_factory=dict)
    train_examples: Positive
    test_examples: Positive
    shape: list[Positive] = Field(min_length=1, max_length=8, description="shape of one input")
    num_classes: Positive | None = None


DataConfig = Annotated[
    DigitsData
    | MNISTData
    | FashionMNISTData
    | CIFAR10Data
    | ImageFolderData
    | ParquetData
    | WebDatasetData
    | SyntheticData
    | PythonData,
    Field(discriminator="kind"),
]

# ------------------------------------------------------------------------------------------------ loss and metrics


class CrossEntropyLoss(Section):
    kind: Literal["cross_entropy"]
    label_smoothing: Fraction = 0.0


class MSELoss(Section):
    kind: Literal["mse"]


class CTCLoss(Section):
    """Connectionist temporal classification (Graves et al. 2006) of logits (examples, frames, classes).

    A target is one row of whole numbers: how many of the frames count, then the labels, then -1 up to the row's end.
    """

    kind: Literal["ctc"]
    blank: NonNegative = 0


class PythonLoss(Section):
    """`target(outputs, targets, **args)` returns a scalar, the mean over the micro-batch."""

    kind: Literal["python"]
    target: Target
    args: dict[str, Any] = Field(default_factory=dict)


LossConfig = Annotated[CrossEntropyLoss | MSELoss | CTCLoss | PythonLoss, Field(discriminator="kind")]

MetricName = Literal[
    "accuracy", "top5_accuracy", "f1", "precision", "recall", "auroc", "calibration_error", "mse", "mae"
]


class EvaluationConfig(Section):
    metrics: list[MetricName] = Field(default=["accuracy"], max_length=16)
    per_class: bool = Field(
        True, description="with a metric of classes: the accuracy of each, where there are at most 100 classes"
    )
    batch: Positive = Field(512, description="examples per rank in one forward pass of an evaluation")


# ------------------------------------------------------------------------------------------------------- optimizer


class ScheduleConfig(Section):
    """Learning rate as a function of the step: linear warm-up, then the named decay to `final_factor` × lr."""

    kind: Literal["constant", "cosine", "linear", "step"] = "constant"
    warmup_steps: NonNegative = 0
    final_factor: Annotated[float, Field(ge=0.0, le=1.0)] = 0.0
    milestones: list[Annotated[float, Field(gt=0.0, lt=1.0)]] = Field(
        default_factory=list, description="`step` only: shares of a phase's steps at which lr is multiplied by `gamma`"
    )
    gamma: Annotated[float, Field(gt=0.0, le=1.0)] = 0.1


class OptimizerSection(Section):
    lr: PositiveFloat
    weight_decay: NonNegativeFloat = 0.0
    clip_norm: PositiveFloat | None = Field(None, description="largest global norm of the gradient")
    schedule: ScheduleConfig = Field(default_factory=ScheduleConfig)


class SGDOptimizer(OptimizerSection):
    kind: Literal["sgd"]
    momentum: Fraction = 0.0
    nesterov: bool = False


Betas = Annotated[list[Fraction], Field(min_length=2, max_length=2)]


class AdamOptimizer(OptimizerSection):
    kind: Literal["adam"]
    betas: Betas = Field(default_factory=lambda: [0.9, 0.999])
    eps: PositiveFloat = 1e-8


class AdamWOptimizer(OptimizerSection):
    kind: Literal["adamw"]
    betas: Betas = Field(default_factory=lambda: [0.9, 0.999])
    eps: PositiveFloat = 1e-8


class AdagradOptimizer(OptimizerSection):
    kind: Literal["adagrad"]
    eps: PositiveFloat = 1e-10


OptimizerConfig = Annotated[
    SGDOptimizer | AdamOptimizer | AdamWOptimizer | AdagradOptimizer, Field(discriminator="kind")
]

# ------------------------------------------------------------------------------------------ precision and topology


class PrecisionConfig(Section):
    """Arithmetic of forward and backward, and the three parts of Micikevicius et al. (2018), each a switch of its own:
    fp32 master weights (`master_weights`), loss scaling (`loss_scale`), fp32 accumulation (`fp32_accumulation`)."""

    dtype: Literal["fp32", "tf32", "bf16", "fp16"] = Field("fp32", description="tf32: fp32 whose products are in TF32")
    master_weights: bool = Field(
        True, description="false: weights are rounded to dtype after every update (an ablation; saves no memory)"
    )
    fp32_accumulation: bool = Field(
        True, description="false: products, sums, norms, softmax and losses accumulate in dtype (an ablation; slow)"
    )
    loss_scale: Literal["dynamic"] | PositiveFloat = Field("dynamic", description="fp16 only")
    initial_scale: PositiveFloat = Field(65536.0, description="first dynamic scale, a power of two")
    scale_window: Positive = Field(1000, description="clean steps after which a dynamic scale is doubled")
    hysteresis: Positive = Field(2, description="overflows before a dynamic scale is halved")
    min_scale: PositiveFloat = Field(1.0, description="a dynamic scale never falls below it")
    at_min_scale: Literal["stop", "hold", "back_off"] = Field(
        "stop",
        description="what an overflow at min_scale does: save and stop; skip the step and go on; or go back to the "
        "weights of the last checkpoint and go on with the next batches, at most three times without an applied step",
    )
    underflow_every: NonNegative = Field(
        0,
        description="fp16 only: steps between samples of the gradients that are zero in fp16 and not in fp32; 0: none. "
        "A sample costs a pass of one micro-batch in fp16 and one in fp32, with backward, and 9 bytes a parameter",
    )

    @property
    def is_low(self) -> bool:
        """Whether weights and activations have half the bits of their masters."""
        return self.dtype in ("bf16", "fp16")


SplitKind = Literal["output_activations", "input_activations", "heads", "output_maps", "input_maps", "image_blocks"]


class ParallelConfig(Section):
    """How the work is spread: `workers` replicas, each of `pipeline` stages, each on `tensor` ranks.

    Ranks = workers × pipeline × tensor. The global batch is split evenly over the workers.
    """

    mode: Literal["synchronous", "parameter_server"] = Field(
        "synchronous", description="parameter_server: asynchronous workers (Downpour SGD, Dean et al. 2012)"
    )
    workers: Annotated[int, Field(gt=0, le=65536)] = 1
    zero: Annotated[int, Field(ge=0, le=3)] = Field(0, description="ZeRO stage")
    offload: Literal["none", "cpu"] = Field(
        "none", description="keep master weights and optimizer state in host memory"
    )
    pipeline: Annotated[int, Field(gt=0, le=1024)] = Field(1, description="pipeline stages")
    stages: Literal["derived", "measured"] | Annotated[list[Positive], Field(max_length=1024)] = Field(
        "derived",
        description="where the pipeline is cut: balanced by derived cost (FLOPs) or by measured time, or the index of "
        "the first layer of the second and every later stage",
    )
    tensor: Annotated[int, Field(gt=0, le=1024)] = Field(1, description="ranks that share the layers in `split`")
    split: dict[Annotated[str, Field(min_length=1)], SplitKind] = Field(
        default_factory=dict,
        description="pattern of module names → how its work is split over the tensor ranks; the first match counts; "
        "default: chosen by the kinds of the layers",
    )
    micro_batch: Positive | None = Field(None, description="largest batch of one forward pass on one rank")
    shards: Annotated[int, Field(gt=0, le=1024)] = Field(1, description="parameter_server: shards of the parameters")
    n_fetch: Positive = Field(1, description="parameter_server: mini-batches between a worker's fetches")
    n_push: Positive = Field(1, description="parameter_server: mini-batches between a worker's pushes")
    max_staleness: NonNegative | None = Field(
        None, description="parameter_server: pushes that a worker may be ahead of the slowest one; default: any number"
    )
    warm_start_steps: NonNegative = Field(
        0, description="parameter_server: steps that one worker takes alone before the others begin"
    )
    device: Literal["auto", "cpu", "cuda"] = Field("auto", description="auto: cuda where the cluster has GPUs")
    cpus_per_worker: Annotated[float, Field(gt=0, le=4096)] = 1.0
    gpus_per_worker: Annotated[float, Field(ge=0.01, le=1)] = Field(
        1.0, description="share of a GPU that each rank has; below 1, jobs of one rank share a GPU"
    )
    max_restarts: Annotated[int, Field(ge=0, le=10_000)] = Field(
        3, description="times that lost workers are replaced before the run fails"
    )


class BudgetConfig(Section):
    """How long to train: `steps` or `epochs`, exactly one of them."""

    steps: Positive | None = None
    epochs: PositiveFloat | None = None
    evaluate_every: NonNegative = Field(0, description="steps between evaluations; 0: only at the end")
    checkpoint_every: NonNegative = Field(0, description="steps between checkpoints; 0: only at the end")
    keep_checkpoints: Positive = Field(2, description="complete checkpoints kept; older ones are removed")


# ----------------------------------------------------------------------------------------------- dense-sparse-dense

Sparsity = Annotated[float, Field(ge=0.0, lt=1.0, allow_inf_nan=False)]
Pattern = Annotated[str, Field(min_length=1)]
Structure = Annotated[str, Field(pattern=r"^(weights|channels|[1-9]\d*:[1-9]\d*)$")]


class RoundConfig(Section):
    """One sparse phase and the re-dense phase after it; each is as long as its steps or its epochs say."""

    sparsity: Sparsity | dict[Pattern, Sparsity] | None = Field(
        None,
        description="share of each layer's weights that is pruned, or pattern of layer names → share; the first match "
        "counts, and what no pattern matches stays dense. 0 prunes nothing: the control with the same restarts. "
        "structure N:M decides it itself",
    )
    structure: Structure = Field(
        "weights",
        description='weights: single ones; channels: whole output channels; "N:M": of every M weights in a row along '
        "the inputs the N largest are kept",
    )
    criterion: Literal["magnitude", "random"] = Field(
        "magnitude", description="what is pruned: the smallest, or, as a control, any"
    )
    sparse_steps: Positive | None = None
    sparse_epochs: PositiveFloat | None = None
    redense_steps: NonNegative | None = Field(None, description="0: the round ends sparse")
    redense_epochs: PositiveFloat | None = None
    sparse_lr_factor: PositiveFloat | None = Field(None, description="default: that of dsd")
    redense_lr_factor: PositiveFloat | None = Field(None, description="default: that of dsd")

    @field_validator("structure", mode="before")
    @classmethod
    def _from_yaml(cls, value: Any) -> Any:
        """YAML 1.1 reads an unquoted 2:4 as 2 × 60 + 4."""
        return f"{value // 60}:{value % 60}" if isinstance(value, int) and value >= 60 else value


class DSDConfig(Section):
    """Dense-sparse-dense training (Han et al. 2017). The budget is that of the dense phase; rounds follow it.

    Biases, norms and embeddings are never pruned.
    """

    rounds: list[RoundConfig] = Field(min_length=1, max_length=64)
    sparse_lr_factor: PositiveFloat = Field(1.0, description="learning rate of sparse phases: this × optimizer.lr")
    redense_lr_factor: PositiveFloat = Field(0.1, description="learning rate of re-dense phases: this × optimizer.lr")
    schedule: ScheduleConfig | None = Field(
        None, description="of the learning rate in each sparse and re-dense phase; default: optimizer.schedule, anew"
    )
    optimizer_state: Literal["fresh", "kept"] = Field(
        "fresh", description="the optimizer's moments where a phase begins: none, as in the paper, or those before it"
    )
    exclude: list[Pattern] = Field(default_factory=list, description="patterns of layer names that are never pruned")
    exclude_first_conv: bool = Field(False, description="leave the first convolution dense, too")


# -------------------------------------------------------------------------------------------------------- distillation


class RampConfig(Section):
    """A value that goes from `start` to `end` over the steps of the dense phase, and stays there."""

    kind: Literal["linear", "cosine"] = "linear"
    start: Annotated[float, Field(ge=0.0, allow_inf_nan=False)]
    end: Annotated[float, Field(ge=0.0, allow_inf_nan=False)]


class TeacherConfig(Section):
    """A trained network: `source`, or `model` with `weights`."""

    source: Annotated[str, Field(min_length=1)] | None = Field(
        None,
        description="a job's file: trained first if it has not been; an MLflow run's id, `runs:/id`, "
        "`models:/name@alias` or `models:/name/version`; or the folder of a run, a phase, a checkpoint or an export",
    )
    phase: Name | None = Field(None, description="of a job or a run; default: its last")
    model: ModelConfig | None = Field(None, description="a network whose weights are in `weights`")
    weights: Annotated[str, Field(min_length=1)] | None = Field(
        None, description="a safetensors file, by model's names"
    )
    precision: Literal["fp32", "bf16", "fp16"] = Field("fp32", description="of the teacher's arithmetic")
    weight: PositiveFloat = Field(1.0, description="in an ensemble, whose logits are the weighted mean")


class FeatureConfig(Section):
    """A level of the student that learns to give what a level of the teacher gives."""

    student: Annotated[str, Field(min_length=1)] = Field(description="dotted name of a module of the student")
    teacher: Annotated[str, Field(min_length=1)] | None = Field(
        None, description="dotted name of a module of the teacher; default: that of the student's"
    )
    of: NonNegative = Field(0, description="which teacher of an ensemble, from 0")
    loss: Literal["mse", "attention_transfer", "cosine", "gram"] | None = Field(
        None, description="default: feature_loss"
    )
    weight: PositiveFloat | None = Field(None, description="default: feature_weight")


class DistillConfig(Section):
    """Distillation (Hinton et al. 2015; FitNets, Romero et al. 2015): the loss is
    alpha · T² · KL(teacher at T ‖ student at T) + (1 − alpha) · loss + Σ weight · feature loss."""

    teacher: (
        Annotated[str, Field(min_length=1)] | TeacherConfig | list[Annotated[str, Field(min_length=1)] | TeacherConfig]
    ) = Field(description="the teacher, by its `source` or in full, or several as an ensemble")
    temperature: PositiveFloat | RampConfig = 4.0
    alpha: Annotated[float, Field(ge=0.0, le=1.0)] | RampConfig = Field(
        0.9, description="weight of the soft targets; that of the labels is 1 − alpha"
    )
    loss: Literal["soft_targets", "decoupled"] = Field(
        "soft_targets", description="decoupled: target class and other classes apart (Zhao et al. 2022)"
    )
    non_target_weight: PositiveFloat = Field(8.0, description="decoupled only: weight of the other classes' part (β/α)")
    standardize: bool = Field(
        False, description="logits of student and teacher to mean 0 and deviation 1 before T (Sun et al. 2024)"
    )
    features: Literal["auto"] | list[FeatureConfig] = Field(
        default_factory=list, description="levels beside the last; auto: paired by stage and shape, as the plan shows"
    )
    feature_loss: Literal["mse", "attention_transfer", "cosine", "gram"] = "mse"
    feature_weight: PositiveFloat = 1.0
    placement: Literal["replicated", "sharded"] = Field(
        "replicated",
        description="a live teacher is whole on every rank, or shared out by ZeRO-3 and gathered by module",
    )
    cache: Literal["none", "logits", "features"] = Field(
        "none",
        description="what is computed once, before the training, over the training set: the teacher's raw logits, or "
        "these and the features of the pairs",
    )
    views: Positive | None = Field(
        None,
        description="augmented views of each example: epoch e shows view e mod views; a cache needs it with augment",
    )
    top_k: Positive | None = Field(
        None, description="cached logits per prediction; the rest share their mean probability"
    )
    signals: Literal["fp16", "fp32"] = Field(
        "fp16", description="type of the teacher's logits and features, live or cached"
    )
    teacher_batch: Positive | None = Field(
        None, description="examples in one forward pass of the teacher; default: a micro-batch, at most 128"
    )


class TrackingConfig(Section):
    experiment: Name = "temper"
    uri: str | None = Field(None, description="default: MLFLOW_TRACKING_URI, else <storage>/mlflow.db")
    record_every: Positive = Field(1, description="steps between two points of the training curves")
    system_metrics: bool = True
    register_as: Name | None = Field(
        None, description="model in MLflow's registry of which each finished run becomes a version; default: none"
    )


class JobConfig(Section):
    """One training job."""

    name: Name
    model: ModelConfig
    data: DataConfig
    loss: LossConfig = Field(default_factory=lambda: CrossEntropyLoss(kind="cross_entropy"))
    optimizer: OptimizerConfig
    precision: PrecisionConfig = Field(default_factory=PrecisionConfig)
    parallel: ParallelConfig = Field(default_factory=ParallelConfig)
    budget: BudgetConfig
    distill: DistillConfig | None = None
    dsd: DSDConfig | None = None
    evaluation: EvaluationConfig = Field(default_factory=EvaluationConfig)
    tracking: TrackingConfig = Field(default_factory=TrackingConfig)
    storage: Annotated[str, Field(min_length=1)] = Field(
        "./runs", description="a folder, on several nodes a shared one, or s3://bucket/prefix or gs://bucket/prefix"
    )
    seed: Annotated[int, Field(ge=0, lt=2**31)] = 0

    @property
    def storage_folder(self) -> Path:
        """The folder in which this machine reads and writes the storage: see :mod:`temper.storage`."""
        return storage_folder(self.storage)


def json_schema() -> dict[str, Any]:
    """The job's JSON Schema (draft 2020-12), for editors."""
    schema = JobConfig.model_json_schema()
    schema["$schema"] = "https://json-schema.org/draft/2020-12/schema"
    schema["title"] = "temper job"
    return schema


if __name__ == "__main__":
    print(json.dumps(json_schema(), indent=2))
