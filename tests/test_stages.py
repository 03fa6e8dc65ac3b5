"""The pipeline's cut: exact against all cuts, what a user may ask for, and what the plan says of it."""

import itertools
import json
import random
from dataclasses import asdict, replace
from pathlib import Path

import pytest

from temper.config.load import build_job
from temper.errors import JobError
from temper.plan import probe
from temper.plan.build import build_plan
from temper.plan.memory import plan_memory, stage_weights
from temper.plan.mesh import BatchPlan, ClusterShape, MeshPlan, plan_batch
from temper.plan.probe import LayerFacts, ModelFacts, Weights
from temper.plan.show import plan_table
from temper.plan.stages import StagePlan, bubble, check_stages, cut_layers, imbalance, plan_stages

CLUSTER = ClusterShape(nodes=1, cpus=8.0, gpus=0.0)


def layer(name, size, flops, output, activation=0, seconds=None, part=None):
    weights = Weights(size, (size,) if size else (), 0)
    return LayerFacts(
        name, weights, None if part is None else Weights(part, (part,), 0), flops, activation, output, seconds
    )


# Costs, by FLOPs + 10 × bytes read and written: 1000 + 80, 0 + 160, 1000 + 120, 500 + 60, 0 + 40.
LAYERS = (
    layer("conv1", 40, 1000, output=8, activation=100, seconds=1.0),
    layer("relu", 0, 0, output=8, activation=20, seconds=4.0),
    layer("conv2", 60, 1000, output=4, activation=30, seconds=1.0),
    layer("fc1", 80, 500, output=2, activation=6, seconds=1.0),
    layer("softmax", 0, 0, output=2, activation=2, seconds=0.0),
)
FACTS = ModelFacts(180, 180, (40, 60, 80), 0, 158, 2500, (10,), LAYERS)
COSTS = [1080, 160, 1120, 560, 40]


def job_of(*overrides):
    base = {
        "name": "job",
        "model": {"kind": "cnn"},
        "data": {"kind": "digits", "global_batch": 64},
        "optimizer": {"kind": "sgd", "lr": 0.1},
        "budget": {"steps": 100},
    }
    return build_job(base, overrides)


@pytest.fixture
def planned(tmp_path, monkeypatch):
    """Plans a job whose model has FACTS, or others that are given."""
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    monkeypatch.chdir(tmp_path)

    def plan(*overrides, facts=FACTS):
        monkeypatch.setattr(probe, "_ask", lambda *_: json.loads(json.dumps(asdict(facts))))
        return build_plan(job_of(*overrides), CLUSTER, tmp_path)

    return plan


# ---------------------------------------------------------------------------------------------------------- the search


def legal_cuts(trainable, stages):
    for firsts in itertools.combinations(range(1, len(trainable)), stages - 1):
        bounds = [0, *firsts, len(trainable)]
        if all(any(trainable[first:end]) for first, end in itertools.pairwise(bounds)):
            yield tuple(bounds[:-1])


def value(cut, costs, sent):
    """Cost of the most expensive stage, then the bytes between stages."""
    bounds = [*cut, len(costs)]
    most = max(sum(costs[first:end]) for first, end in itertools.pairwise(bounds))
    return most, sum(sent[first - 1] for first in cut[1:])


@pytest.mark.parametrize("seed", range(60))
def test_no_cut_is_better(seed):
    draw = random.Random(seed)
    count = draw.randint(1, 9)
    costs = [draw.choice([0, 1, 1, 2, 3, 8]) for _ in range(count)]
    trainable = [draw.random() < 0.7 for _ in range(count)]
    sent = [draw.randint(0, 4) for _ in range(count)]
    for stages in range(1, sum(trainable) + 1):
        cuts = list(legal_cuts(trainable, stages))
        found = cut_layers(costs, trainable, sent, stages)
        assert found in cuts
        assert value(found, costs, sent) == min(value(cut, costs, sent) for cut in cuts)


def test_a_thousand_layers_are_cut_evenly():
    found = cut_layers([1] * 1024, [True] * 1024, [1] * 1024, 16)
    assert found == tuple(range(0, 1024, 64))


def test_equal_costs_are_told_apart_by_what_is_sent():
    assert cut_layers([1, 0, 0, 1], [True] * 4, [9, 5, 7, 0], 2) == (0, 2)
    assert cut_layers([1, 0, 0, 1], [True] * 4, [5, 5, 5, 0], 2) == (0, 1), "of equals the earliest"


def test_costs_are_flops_and_bytes_moved():
    (first, second) = plan_stages(job_of("parallel.pipeline=2"), LAYERS, BatchPlan(64, 64, 8, 8))
    assert (first.first_layer, second.first_layer) == (0, 2)
    assert first.cost_share == pytest.approx(sum(COSTS[:2]) / sum(COSTS))
    assert second.cost_share == pytest.approx(sum(COSTS[2:]) / sum(COSTS))
    assert (first.layers, first.parameters, first.sent_bytes) == (2, 40, 8 * 8)
    assert (second.layers, second.parameters, second.sent_bytes) == (3, 140, 0)


def test_measured_seconds_take_the_place_of_flops():
    stages = plan_stages(job_of("parallel={pipeline: 2, stages: measured}"), LAYERS, BatchPlan(64, 64, 8, 8))
    # 1 | 4 1 1 0 costs 6 and 1 4 | 1 1 0 costs 5.
    assert [stage.first_layer for stage in stages] == [0, 2]
    assert [stage.cost_share for stage in stages] == [5 / 7, 2 / 7]


def test_a_users_own_cut_is_taken_as_it_is():
    stages = plan_stages(job_of("parallel={pipeline: 3, stages: [1, 3]}"), LAYERS, BatchPlan(64, 64, 8, 8))
    assert [(stage.first_layer, stage.layers) for stage in stages] == [(0, 1), (1, 2), (3, 2)]
    assert imbalance(stages) == pytest.approx(3 * (160 + 1120) / sum(COSTS))


def test_activations_are_sent_in_the_precision_of_the_layers():
    stages = plan_stages(job_of("parallel.pipeline=2", "precision.dtype=bf16"), LAYERS, BatchPlan(64, 64, 8, 8))
    assert stages[0].sent_bytes == 8 * 8 // 2


@pytest.mark.parametrize(("stages", "micro_batches", "share"), [(1, 4, 0.0), (2, 1, 0.5), (2, 4, 0.2), (4, 12, 0.2)])
def test_bubble(stages, micro_batches, share):
    assert bubble(stages, micro_batches) == pytest.approx(share)


def test_imbalance_of_even_stages_is_one():
    assert imbalance([StagePlan(0, 1, 1, 0.5, 0), StagePlan(1, 1, 1, 0.5, 0)]) == 1.0


# ------------------------------------------------------------------------------------------------------ what is refused


@pytest.mark.parametrize(
    ("parallel", "key", "said"),
    [
        ("{pipeline: 4}", "parallel.pipeline", "more than the 3 layers of the model that have trainable parameters"),
        ("{pipeline: 4}", "parallel.pipeline", "use pipeline: 3"),
        ("{pipeline: 2, stages: [5]}", "parallel.stages", "the model has layers 0 to 4; use e.g. [2]"),
        ("{pipeline: 2, stages: [4]}", "parallel.stages", "leaves stage 1 (layers 4 to 4) without a trainable"),
        ("{pipeline: 3, stages: [1, 2]}", "parallel.stages", "leaves stage 1 (layers 1 to 1) without"),
    ],
)
def test_a_cut_that_cannot_be_is_refused(parallel, key, said):
    problems = check_stages(job_of(f"parallel={parallel}").parallel, LAYERS)
    assert [problem.key for problem in problems] == [key]
    assert said in str(problems[0])


@pytest.mark.parametrize("parallel", ["{}", "{pipeline: 3}", "{pipeline: 3, stages: [2, 3]}"])
def test_a_cut_that_can_be_is_not(parallel):
    assert check_stages(job_of(f"parallel={parallel}").parallel, LAYERS) == []


@pytest.mark.parametrize(
    ("overrides", "remedy"),
    [
        ([], "use one that is (resnet, mlp"),
        (["model={kind: torchvision, name: googlenet}"], "set model.args: {aux_logits: false}"),
        (["model={kind: python, target: own_net:build}"], "give the model a method pipeline_layers"),
    ],
)
def test_a_model_that_is_no_sequence_cannot_be_cut(planned, tmp_path, overrides, remedy):
    (tmp_path / "own_net.py").write_text("def build(): ...\n")
    with pytest.raises(JobError) as caught:
        planned("parallel.pipeline=2", *overrides, facts=replace(FACTS, layers=()))
    (problem,) = caught.value.problems
    assert problem.key == "parallel.pipeline"
    assert remedy in problem.remedy


# ------------------------------------------------------------------------------------------------------------ the plan


@pytest.mark.parametrize(
    ("global_batch", "data", "limit", "least", "plan"),
    [
        (64, 1, None, 8, BatchPlan(64, 64, 8, 8)),
        (60, 1, None, 8, BatchPlan(60, 60, 6, 10)),
        (14, 1, None, 8, BatchPlan(14, 14, 1, 14)),
        (12, 2, None, 8, BatchPlan(12, 6, 1, 6)),
        (64, 1, 4, 8, BatchPlan(64, 64, 4, 16)),
    ],
)
def test_a_pipeline_has_enough_micro_batches(global_batch, data, limit, least, plan):
    assert plan_batch(global_batch, data, limit, least) == plan


def test_a_pipeline_in_the_plan(planned):
    plan = planned("parallel={pipeline: 2, workers: 2}")
    assert plan.mesh == MeshPlan(2, 2, "cpu", 1, (0, 2), {})
    assert plan.batch == BatchPlan(64, 32, 4, 8)
    assert [stage.parameters for stage in plan.stages] == [40, 140]
    assert plan.to_dict()["stages"][0]["sent_bytes"] == 8 * 4
    assert json.loads(json.dumps(plan.to_dict()))["mesh"]["cut"] == [0, 2]
    text = plan_table(plan)
    for part in (
        "data 2 × pipeline 2 × tensor 1 = 4 ranks on cpu",
        "stage 0      layers 0 to 1 (conv1 … relu), 40 parameters, 42% of the cost, sends 32 B a micro-batch\n",
        "stage 1      layers 2 to 4 (conv2 … softmax), 140 parameters, 58% of the cost\n",
        "bubble       11% of a step with 8 micro-batches; the most expensive stage costs 1.16 × the mean of all",
        "64 = 2 replicas × 8 micro-batches × 4 examples",
        "note: a rank's batch is cut into 8 micro-batches of 4 (at least 4 for each stage)",
    ):
        assert part in text


def test_too_few_examples_for_the_pipeline_are_told(planned):
    plan = planned("parallel={pipeline: 2}", "data.global_batch=5")
    assert plan.batch.accumulation == 5
    assert "note: a rank's batch is cut into 5 micro-batches of 1 (a rank has no more examples)" in plan_table(plan)


def test_micro_batches_that_are_asked_for_are_taken(planned):
    plan = planned("parallel={pipeline: 2, micro_batch: 32}")
    assert plan.batch.accumulation == 2
    assert not any("a rank's batch is cut" in note for note in plan.notes)


def test_one_stage_has_no_stages(planned):
    plan = planned()
    assert (plan.stages, plan.mesh.cut) == ((), ())
    assert "bubble" not in plan_table(plan)


def test_layers_are_timed_where_the_cut_asks_for_it(planned, monkeypatch):
    plan = planned("parallel={pipeline: 2, stages: measured, cpus_per_worker: 2.5}", "precision.dtype=bf16")
    assert any("measured on this machine" in note for note in plan.notes)
    assert "71% of the measured time" in plan_table(plan)
    asked = []
    monkeypatch.setattr(probe, "_ask", lambda question, *_: asked.append(question) or asdict(FACTS))
    job = "parallel={pipeline: 2, stages: measured, cpus_per_worker: 2.5}", "precision.dtype=bf16"
    assert build_plan(job_of(*job), CLUSTER, Path.cwd()).mesh == plan.mesh
    assert asked == [], "what was measured is kept"
    build_plan(job_of(job[0]), CLUSTER, Path.cwd())
    (question,) = asked
    timing = {"device": "cpu", "threads": 2, "dtype": "fp32", "examples": 8}
    assert {key: question["timing"][key] for key in timing} == timing
    assert question["timing"]["machine"]


@pytest.mark.parametrize("other", ["parallel={pipeline: 2, stages: [1]}", "parallel={pipeline: 3, micro_batch: 8}"])
def test_the_cut_is_in_the_fingerprint(planned, other):
    assert planned(other).fingerprint != planned("parallel={pipeline: 2}").fingerprint


def test_the_same_cut_by_hand_is_the_same_job(planned):
    by_hand = planned("parallel={pipeline: 2, stages: [2]}")
    assert by_hand.fingerprint == planned("parallel={pipeline: 2}").fingerprint


# -------------------------------------------------------------------------------------------------------------- memory


def test_each_stage_holds_its_own_layers():
    mesh = MeshPlan(1, 2, "cpu", cut=(0, 2))
    assert stage_weights(FACTS, mesh) == [Weights(40, (40,), 0), Weights(140, (60, 80), 0)]
    parts = replace(FACTS, layers=tuple(replace(item, part=Weights(7, (7,), 1)) for item in LAYERS))
    assert stage_weights(parts, mesh) == [Weights(14, (7, 7), 2), Weights(21, (7, 7, 7), 3)]


@pytest.mark.parametrize(
    ("batch", "parameters", "activations"),
    [
        # Of the first stage, with two micro-batches under way, or with the only one.
        (BatchPlan(64, 64, 8, 8), 40, 2 * (100 + 20) * 8),
        (BatchPlan(32, 32, 32, 1), 40, (100 + 20) * 32),
        # Of the second, which has more parameters and also keeps what it received.
        (BatchPlan(1, 1, 1, 1), 140, 8 + 30 + 6 + 2),
    ],
)
def test_a_stage_holds_what_is_under_way(batch, parameters, activations):
    memory = plan_memory(job_of("parallel.pipeline=2"), FACTS, MeshPlan(1, 2, "cpu", cut=(0, 2)), batch)
    assert (memory.parameters, memory.activations) == (4 * parameters, activations)


def test_deepspeeds_buffers_fit_the_largest_stage(planned):
    engine = planned("parallel={pipeline: 2, workers: 2, zero: 1}").phases[0].deepspeed
    assert engine["zero_optimization"]["reduce_bucket_size"] == 140
