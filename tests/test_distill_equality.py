"""Distillation is exact on every mesh: soft targets and levels of the network, with connectors, give what a plain loop
in one process gives, on whichever stage, rank or part of an image a level is computed."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from engine_cases import OPTIMIZERS, TORCH, Case, build_batches, build_engine, cross_entropy, rank_rows, save
from mesh_runs import Run, Trained, every, legal_cases
from temper.checkpoint import MASTER, CheckpointReader, model_state
from temper.config.schema import CrossEntropyLoss, DistillConfig, PrecisionConfig
from temper.engine.parameter_server import MiniBatch, Replica
from temper.parallel.groups import MeshGroups
from temper.plan.distill import CONNECTORS, Connector, FeaturePair
from temper.techniques.distill.features import FeatureTaps, build_connectors
from temper.techniques.distill.signals import Lesson, Signals, Taught
from temper.techniques.distill.soft_targets import DistillLoss

STEPS = 6
TEMPERATURE, ALPHA = 4.0, 0.7
# With a level between two layers that share one exchange, one before an activation in place, one behind it; two stages
# have levels of their own.
PAIRS = (
    FeaturePair("1", "1", 0, "mse", 0.5, (8, 8, 8), (12, 8, 8), Connector("conv1x1", 8, 12)),
    FeaturePair("3", "3", 0, "attention_transfer", 2.0, (7, 8, 8), (12, 4, 4), Connector("none", 7, 7, size=(4, 4))),
    FeaturePair("4", "1", 0, "gram", 3.0, (7, 8, 8), (12, 8, 8), Connector("conv1x1", 7, 12)),
)
CUT = (0, 3)
SPLITS = {
    "maps": {"0": "output_maps", "2": "input_maps", "6": "output_activations"},
    "blocks": dict.fromkeys("01234", "image_blocks"),
}


def build_student() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Conv2d(1, 8, 3, padding=1),
        nn.ReLU(),
        nn.Conv2d(8, 7, 3, padding=1, bias=False),
        nn.BatchNorm2d(7),
        nn.ReLU(inplace=True),
        nn.Flatten(),
        nn.Linear(7 * 64, 10),
    )


def build_teacher() -> nn.Sequential:
    torch.manual_seed(7)
    layers = [nn.Conv2d(1, 12, 3, padding=1), nn.ReLU(), nn.Conv2d(12, 12, 3, stride=2, padding=1), nn.ReLU()]
    return nn.Sequential(*layers, nn.Flatten(), nn.Linear(12 * 16, 10)).eval().requires_grad_(False)


def ask(inputs: Tensor) -> Signals:
    """The teacher's signals, rounded as they travel."""
    teacher = build_teacher()
    first = teacher[:2](inputs)
    second = teacher[2:4](first)
    return Signals((5 * teacher[4:](second)).half(), (first.half(), second.half(), first.half()))


# ------------------------------------------------------------------------------------------------ a single process


def reference_terms(
    model: nn.Sequential, connectors: nn.ModuleDict, inputs: Tensor, targets: Tensor
) -> dict[str, Tensor]:
    taught = ask(inputs)
    logits = taught.logits.float()
    first, second, third = (feature.float() for feature in taught.features)
    low = model[:2](inputs)
    normed = model[2:4](low)
    active = normed.clamp(min=0)
    outputs = model[5:](active)
    soft = F.kl_div((outputs / TEMPERATURE).log_softmax(1), (logits / TEMPERATURE).softmax(1), reduction="batchmean")

    def attention(maps: Tensor) -> Tensor:
        return F.normalize(F.adaptive_avg_pool2d(maps.square().sum(1), (4, 4)).flatten(1), dim=1)

    def gram(maps: Tensor) -> Tensor:
        return torch.einsum("nchw,ndhw->ncd", maps, maps) / maps[0, 0].numel()

    return {
        "cross_entropy": (1 - ALPHA) * F.cross_entropy(outputs, targets),
        "soft_targets": ALPHA * TEMPERATURE**2 * soft,
        "features/1": 0.5 * (connectors["0"](low) - first).square().mean(),
        "features/3": 2.0 * (attention(normed) - attention(second)).square().sum(1).mean(),
        "features/4": 3.0 * (gram(connectors["2"](active)) - gram(third)).square().mean(),
    }


def reference(case: Case) -> tuple[dict[str, Tensor], list[dict[str, float]]]:
    """The plain loop: the student's and the connectors' state at the end, and each step's terms."""
    model, connectors = build_student(), build_connectors(PAIRS, 0)
    section = {key: value for key, value in OPTIMIZERS[case.optimizer].items() if key != "kind"}
    trained = [*model.parameters(), *connectors.parameters()]
    stepper, history = TORCH[case.optimizer](trained, **section), []
    for inputs, targets in build_batches()[:STEPS]:
        stepper.zero_grad()
        sums: dict[str, float] = {}
        for x, y in zip(inputs.chunk(case.accumulation), targets.chunk(case.accumulation), strict=True):
            terms = reference_terms(model, connectors, x, y)
            (sum(terms.values()) / case.accumulation).backward()  # type: ignore[union-attr]
            for name, value in terms.items():
                sums[name] = sums.get(name, 0.0) + float(value.detach()) / case.accumulation
        history.append(sums)
        if case.clip is not None:
            nn.utils.clip_grad_norm_(trained, case.clip)
        stepper.step()
    named = {f"{CONNECTORS}.{name}": value for name, value in connectors.state_dict().items()}
    return {name: value.clone() for name, value in {**model.state_dict(), **named}.items()}, history


# ----------------------------------------------------------------------------------------------------- on a mesh


def train_run(run: Run, folder: Path, groups: MeshGroups) -> dict[str, Any]:
    case = run.case
    config = DistillConfig.model_validate({"teacher": "t", "temperature": TEMPERATURE, "alpha": ALPHA})
    loss = DistillLoss(cross_entropy, config, CrossEntropyLoss(kind="cross_entropy"), STEPS)
    taps = FeatureTaps(PAIRS, 0)
    engine, batch = build_engine(case, groups, build_student(), loss, taps)
    rows, terms, applied = rank_rows(engine, batch), [], []
    for number, (inputs, targets) in enumerate(build_batches()[:STEPS]):
        loss.begin_step(number)
        own, labels = inputs[rows], targets[rows]
        taught = Taught(labels, ask(own)) if case.pipeline > 1 else Lesson(labels, own, ask)
        result = engine.step(own, taught, lr=OPTIMIZERS[case.optimizer]["lr"], seed=number)
        terms.append({name: float(value) for name, value in result.terms.items()})
        applied.append(result.applied)
    logits = engine.predict(build_batches()[0][0][:30]).float()
    return {"end": save(engine, folder, STEPS), "terms": terms, "applied": applied, "logits": logits}


RUNS = [Run(*item) for item in legal_cases(Case(clip=1.0, accumulation=2, cut=CUT), SPLITS)]
every_run = every(RUNS)


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Trained:
    return Trained(RUNS, train_run, tmp_path_factory.mktemp("distill"))


PATH_ERROR = {"bf16": 0.14, "fp16": 0.12}
"""In low precision the error of the end point as a share of the way to it."""
TERM_ERROR = {"fp32": 1e-4, "bf16": 2e-2, "fp16": 2e-3}


@every_run
def test_the_weights_at_the_end_are_those_of_a_plain_loop(trained: Trained, run: Run) -> None:
    """Those of the connectors, too."""
    result = trained[run][0]
    assert all(result["applied"])
    expected, _ = reference(run.case)
    reader = CheckpointReader(result["end"])
    found = {name: reader.full(MASTER, name) for name in reader.names(MASTER)}
    assert {name for name in found if name.startswith(CONNECTORS)} == {
        f"{CONNECTORS}.{name}" for name, _ in build_connectors(PAIRS, 0).named_parameters()
    }
    if run.case.dtype == "fp32":
        for name, value in found.items():
            error = (value.double() - expected[name].double()).norm() / expected[name].double().norm()
            assert error < 1e-5, f"{name}: {error:.1e}"
        return
    connectors = {f"{CONNECTORS}.{name}": value for name, value in build_connectors(PAIRS, 0).state_dict().items()}
    start = {**build_student().state_dict(), **connectors}
    off = torch.cat([(value - expected[name]).flatten() for name, value in found.items()])
    path = torch.cat([(expected[name] - start[name]).flatten() for name in found])
    assert off.norm() / path.norm() < PATH_ERROR[run.case.dtype]


@every_run
def test_every_rank_reports_the_terms_of_its_examples(trained: Trained, run: Run) -> None:
    """Averaged over the replicas they are those of the plain loop, on every stage the same."""
    _, history = reference(run.case)
    ranks = trained[run]
    # In low precision the weights of later steps have gone another way.
    for number, expected in enumerate(history if run.case.dtype == "fp32" else history[:1]):
        for name, value in expected.items():
            mean = sum(result["terms"][number][name] for result in ranks) / len(ranks)
            assert mean == pytest.approx(value, rel=TERM_ERROR[run.case.dtype]), (number, name)
        assert all(list(result["terms"][number]) == list(ranks[0]["terms"][number]) for result in ranks)


@every_run
def test_connectors_are_not_part_of_the_model(trained: Trained, run: Run) -> None:
    result = trained[run][0]
    assert set(model_state(CheckpointReader(result["end"]))) == set(build_student().state_dict())


def test_a_worker_of_a_parameter_server_has_the_gradient_of_a_plain_loop() -> None:
    """Soft targets; levels are refused there."""
    config = DistillConfig.model_validate({"teacher": "t", "temperature": TEMPERATURE, "alpha": ALPHA})
    loss = DistillLoss(cross_entropy, config, CrossEntropyLoss(kind="cross_entropy"), STEPS)
    inputs, targets = build_batches()[0]
    replica = Replica(build_student(), loss, PrecisionConfig(), torch.device("cpu"))
    found, gradient = replica.compute(MiniBatch(inputs, Taught(targets, ask(inputs)), 0.1, 0))
    model = build_student()
    terms = reference_terms(model, build_connectors(PAIRS, 0), inputs, targets)
    (terms["cross_entropy"] + terms["soft_targets"]).backward()
    expected = torch.cat([param.grad.flatten() for param in model.parameters() if param.grad is not None])
    assert (gradient - expected).norm() / expected.norm() < 1e-5
    for name in ("cross_entropy", "soft_targets"):
        assert float(found[name]) == pytest.approx(float(terms[name].detach()), rel=1e-5)


def test_levels_change_the_result() -> None:
    """The comparison above would notice levels that no gradient reaches."""
    case = Case()
    expected, _ = reference(case)
    without, _ = _reference_without_levels(case)
    error = (expected["0.weight"] - without["0.weight"]).norm() / expected["0.weight"].norm()
    assert error > 1e-3


def _reference_without_levels(case: Case) -> tuple[dict[str, Tensor], list[float]]:
    model, losses = build_student(), []
    section = {key: value for key, value in OPTIMIZERS[case.optimizer].items() if key != "kind"}
    stepper = TORCH[case.optimizer](model.parameters(), **section)
    for inputs, targets in build_batches()[:STEPS]:
        stepper.zero_grad()
        terms = reference_terms(model, build_connectors(PAIRS, 0), inputs, targets)
        loss = terms["cross_entropy"] + terms["soft_targets"]
        loss.backward()
        losses.append(float(loss.detach()))
        stepper.step()
    return model.state_dict(), losses
