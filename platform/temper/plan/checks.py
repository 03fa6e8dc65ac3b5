"""Rules that need more than the job: the facts of its data and model, the machine's folders, the tracking address."""

from __future__ import annotations

import os
import re
from collections.abc import Iterator, Mapping
from pathlib import Path

from temper.config.explain import suggest
from temper.config.schema import JobConfig
from temper.errors import Problem
from temper.plan.dsd import check_layers
from temper.plan.facts import DataFacts
from temper.plan.phases import phase_schedule, phase_steps, plan_steps
from temper.plan.probe import ModelFacts
from temper.plan.stages import check_stages
from temper.storage import check_address, check_reachable, is_remote

_MAX_STEPS = 2**40
_TRACKING_SCHEMES = ("sqlite", "postgresql", "mysql", "mssql", "http", "https", "databricks")
_PASSWORD = re.compile(r"(?<=://)(?P<user>[^/:@]*):[^/]*@")


def check_data(job: JobConfig, data: DataFacts) -> list[Problem]:
    """What of the job its data cannot give."""
    problems = []
    batch, examples = job.data.global_batch, data.train_examples
    if batch > examples:
        workers = job.parallel.workers
        largest = examples // workers * workers
        remedy = f"use at most {largest}" if largest else f"use at most {examples}, and as many workers"
        problems.append(Problem("data.global_batch", batch, f"is larger than the training split of {examples}", remedy))
    problems += _check_epochs(job, data)
    problems += _check_rounds(job, data)
    problems += _check_classes(job, data)
    problems += _check_omitted(job, data)
    problems += _check_metrics(job, data)
    problems += _check_tokens(job)
    problems += _check_image_blocks(job, data)
    return problems


def _check_epochs(job: JobConfig, data: DataFacts) -> list[Problem]:
    """For a budget of epochs what the schema and check_job say of one of steps."""
    epochs, warmup = job.budget.epochs, job.optimizer.schedule.warmup_steps
    if epochs is None or job.budget.steps is not None:
        return []
    too_many = _too_many_epochs("budget.epochs", epochs, data)
    if too_many:
        return too_many
    steps = plan_steps(job, data)
    if warmup < steps:
        return []
    rule = f"never ends: budget.epochs: {epochs:g} are {steps} steps"
    return [Problem("optimizer.schedule.warmup_steps", warmup, rule, f"use at most {steps - 1}")]


def _too_many_epochs(key: str, epochs: float | None, data: DataFacts) -> list[Problem]:
    if epochs is None or epochs * data.train_examples <= _MAX_STEPS:
        return []
    most = _MAX_STEPS // data.train_examples
    return [Problem(key, epochs, "is more than any run can take", f"use at most {most}")]


def _check_rounds(job: JobConfig, data: DataFacts) -> list[Problem]:
    """The lengths of sparse and re-dense phases, once check_job finds each one given."""
    budget, lengths = job.budget, list(_lengths(job))
    problems = [problem for key, _, epochs in lengths for problem in _too_many_epochs(f"{key}_epochs", epochs, data)]
    if problems or _too_many_epochs("budget.epochs", budget.epochs, data) or not lengths:
        return problems
    steps = {key: phase_steps(number, epochs, job, data) for key, number, epochs in lengths}
    dense = [(budget.steps, budget.epochs)] if _is_one(budget.steps, budget.epochs) else []
    total = sum([*steps.values(), *(phase_steps(*length, job, data) for length in dense)])
    if total > _MAX_STEPS:
        rule = f"make {total} steps with the budget, more than any run can take"
        return [Problem("dsd.rounds", None, rule, "use fewer or shorter ones")]
    return _check_warmup(job, {key: number for key, number in steps.items() if number > 0})


def _lengths(job: JobConfig) -> Iterator[tuple[str, int | None, float | None]]:
    """(beginning of the keys, steps, epochs) of each sparse and re-dense phase that has one of the two."""
    for index, round_ in enumerate(job.dsd.rounds if job.dsd else ()):
        for kind, steps, epochs in (
            ("sparse", round_.sparse_steps, round_.sparse_epochs),
            ("redense", round_.redense_steps, round_.redense_epochs),
        ):
            if _is_one(steps, epochs):
                yield f"dsd.rounds.{index}.{kind}", steps, epochs


def _is_one(steps: int | None, epochs: float | None) -> bool:
    return (steps is None) != (epochs is None)


def _check_warmup(job: JobConfig, steps: Mapping[str, int]) -> list[Problem]:
    """The warm-up of sparse and re-dense phases against the shortest of them."""
    assert job.dsd is not None, "only its rounds have such phases"
    own = job.dsd.schedule is not None
    warmup = phase_schedule(job, "sparse").warmup_steps
    shortest, number = min(steps.items(), key=lambda item: item[1], default=("", warmup + 1))
    if warmup < number:
        return []
    rule = f"never ends in a phase of {number} {'step' if number == 1 else 'steps'} ({shortest}_steps or _epochs)"
    remedy = f"use at most {number - 1}" + ("" if own else " or give these phases a dsd.schedule of their own")
    return [Problem(f"{'dsd' if own else 'optimizer'}.schedule.warmup_steps", warmup, rule, remedy)]


def _check_classes(job: JobConfig, data: DataFacts) -> list[Problem]:
    """The model needs an output for every class; more are legal, and wasted."""
    asked = getattr(job.model, "num_classes", None)
    if data.num_classes is None:
        if job.model.kind != "python" and job.model.kind != "transformers" and asked is None:
            rule = "must be given, because data.num_classes is not"
            return [Problem("model.num_classes", None, rule, "give the number of the model's outputs")]
        return []
    if asked is not None and asked < data.num_classes:
        rule = f"is less than the data's {data.num_classes} classes"
        return [Problem("model.num_classes", asked, rule, f"use {data.num_classes} or leave it out")]
    return []


def _check_omitted(job: JobConfig, data: DataFacts) -> list[Problem]:
    omitted, classes = job.data.omit_classes, data.num_classes
    if not omitted:
        return []
    if classes is None:
        rule = "needs data with classes, and data.num_classes is not given"
        return [Problem("data.omit_classes", omitted, rule, "give data.num_classes")]
    if max(omitted) >= classes:
        rule = f"names a class that is none of the {classes}"
        return [Problem("data.omit_classes", omitted, rule, f"use some of 0 to {classes - 1}")]
    if len(set(omitted)) == classes:
        return [Problem("data.omit_classes", omitted, "leaves no class to train on", "keep some")]
    return []


def _check_metrics(job: JobConfig, data: DataFacts) -> list[Problem]:
    if data.num_classes is None or data.num_classes >= 5 or "top5_accuracy" not in job.evaluation.metrics:
        return []
    index = job.evaluation.metrics.index("top5_accuracy")
    rule = f"is always 1 with {data.num_classes} classes; it needs at least 5"
    return [Problem(f"evaluation.metrics.{index}", "top5_accuracy", rule, "leave it out")]


def _check_tokens(job: JobConfig) -> list[Problem]:
    if job.model.kind != "gpt" or job.data.kind == "python":
        return []
    rule = f"takes token ids, and data of kind {job.data.kind} are images or other floats"
    return [Problem("model.kind", "gpt", rule, "use data of kind python that give int64 ids, or another model")]


def _check_image_blocks(job: JobConfig, data: DataFacts) -> list[Problem]:
    if len(data.shape) == 3:
        return []
    rule = f"needs images (channels, height, width), and an example has the shape {list(data.shape)}"
    return [
        Problem(f"parallel.split.{pattern}", kind, rule, "split by output_activations or input_activations")
        for pattern, kind in job.parallel.split.items()
        if kind == "image_blocks"
    ]


def check_model(job: JobConfig, data: DataFacts, model: ModelFacts) -> list[Problem]:
    """What the built model shows: nothing to train, too few outputs for the classes, no stages to cut it into, no layer
    to prune."""
    if model.num_trainable == 0:
        return [Problem("model", job.model.kind, "has no trainable parameter", "use a model with weights")]
    return [*_check_outputs(job, data, model), *_check_pipeline(job, model), *check_layers(job, model.prunable)]


def _check_outputs(job: JobConfig, data: DataFacts, model: ModelFacts) -> list[Problem]:
    shape = model.output_shape
    if job.loss.kind == "ctc" and shape:
        return _check_frames(job, shape, job.loss.blank)
    if job.loss.kind != "cross_entropy" or data.num_classes is None or not shape or shape[-1] >= data.num_classes:
        return []
    rule = f"gives {shape[-1]} outputs per example, and the data has {data.num_classes} classes"
    return [Problem("model", job.model.kind, rule, f"give it {data.num_classes} outputs")]


def _check_frames(job: JobConfig, shape: tuple[int, ...], blank: int) -> list[Problem]:
    if len(shape) != 2:
        rule = f"gives outputs of the shape {list(shape)} per example, and loss.kind: ctc needs (frames, classes)"
        return [Problem("model", job.model.kind, rule, "use a model of sequences")]
    if blank >= shape[1]:
        return [Problem("loss.blank", blank, f"is none of the model's {shape[1]} classes", f"use 0 to {shape[1] - 1}")]
    return []


def _check_pipeline(job: JobConfig, model: ModelFacts) -> list[Problem]:
    if job.parallel.pipeline == 1 or model.layers:
        return check_stages(job.parallel, model.layers)
    name = getattr(job.model, "target", None) or getattr(job.model, "name", job.model.kind)
    rule = f"cannot be cut: the model ({name}) is not a sequence of layers that each parameter lies in once"
    return [Problem("parallel.pipeline", job.parallel.pipeline, rule, _sequence_remedy(job))]


def _sequence_remedy(job: JobConfig) -> str:
    if job.model.kind == "python":
        return "build an nn.Sequential, give the model a method pipeline_layers, or use pipeline: 1"
    if job.model.kind == "torchvision" and job.model.name == "googlenet":
        return "set model.args: {aux_logits: false} or use pipeline: 1"
    sequences = "resnet, mlp, cnn, gpt and, of torchvision, ResNet, VGG, AlexNet, GoogLeNet, MobileNet and DenseNet"
    return f"use one that is ({sequences}) or pipeline: 1"


def check_storage(job: JobConfig) -> list[Problem]:
    """`storage` must be a folder that this process can write to, or one that it can make; for an address that is its
    working folder, and the bucket must be there and let this machine in."""
    text, folder = job.storage, job.storage_folder
    if not is_remote(text):
        return _check_folder(text, folder)
    return check_address(text) or _check_folder(text, folder) or check_reachable(text)


def _check_folder(text: str, folder: Path) -> list[Problem]:
    try:
        existing = folder.absolute()
        while not existing.exists():
            existing = existing.parent
        if not existing.is_dir():
            return [Problem("storage", text, f"cannot be a folder: {existing} is a file", "use another path")]
        if not os.access(existing, os.W_OK | os.X_OK):
            return [Problem("storage", text, f"cannot be written: no permission in {existing}", "use another folder")]
    except OSError as error:
        return [Problem("storage", text, f"cannot be used: {error.strerror}", "use another path")]
    return []


def check_tracking(job: JobConfig) -> list[Problem]:
    """The tracking address, from the job or from MLFLOW_TRACKING_URI, must be of a kind that keeps what is logged."""
    if job.tracking.uri is not None:
        return check_tracking_uri(job.tracking.uri, "")
    uri = os.environ.get("MLFLOW_TRACKING_URI")
    return check_tracking_uri(uri, "MLFLOW_TRACKING_URI") if uri else []


def check_tracking_uri(uri: str, source: str) -> list[Problem]:
    """What is wrong with a tracking address; `source` is the variable that it comes from, if any."""
    if uri == "databricks":
        return []
    origin = f" (from {source})" if source else ""
    scheme, separator, rest = uri.partition("://")
    dialect = scheme.split("+")[0]
    # What is printed may end in a log.
    shown = _PASSWORD.sub(r"\g<user>:***@", uri)
    if not separator:
        rule = f"is not an address{origin}: it has no scheme"
        remedy = f"use e.g. sqlite:///{uri.strip('/') or 'mlflow'}.db or http://host:5000"
        return [Problem("tracking.uri", shown, rule, remedy)]
    if dialect not in _TRACKING_SCHEMES:
        rule = f"has the scheme {scheme}, which cannot be tracked to{origin}"
        return [Problem("tracking.uri", shown, rule, suggest(dialect, _TRACKING_SCHEMES))]
    if not rest.strip("/"):
        rule = f"names no {'file' if dialect == 'sqlite' else 'host'}{origin}"
        return [Problem("tracking.uri", shown, rule, "complete it")]
    return []
