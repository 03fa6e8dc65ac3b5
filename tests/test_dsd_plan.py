"""The schedule of dense-sparse-dense training as the plan decides it: phases, what is pruned, and what is refused."""

import json
from dataclasses import asdict, replace
from pathlib import Path

import pytest
import torch
from pydantic import TypeAdapter
from torch import nn

from temper.config.compose import compose, compose_table, conflict
from temper.config.load import build_job
from temper.config.schema import ModelConfig
from temper.errors import JobError
from temper.models.build import build_model
from temper.models.probe import answer, prunable_weights
from temper.plan import probe
from temper.plan.build import build_plan
from temper.plan.dsd import candidates, count_pruned, resolve_layers
from temper.plan.facts import DataFacts
from temper.plan.mesh import ClusterShape
from temper.plan.phases import Pruning, learning_rate
from temper.plan.probe import ModelFacts, PrunableWeight
from temper.plan.show import plan_table
from temper.techniques.dsd.masks import select_mask

CLUSTER = ClusterShape(nodes=1, cpus=8.0, gpus=0.0)
PRUNABLE = (
    PrunableWeight("conv1.weight", (16, 3, 3, 3), "convolution"),
    PrunableWeight("layer1.0.conv1.weight", (16, 16, 3, 3), "convolution"),
    PrunableWeight("rnn.weight_ih_l0", (40, 8), "recurrent"),
    PrunableWeight("fc.weight", (10, 50), "linear"),
)
SIZES = {"conv1.weight": 432, "layer1.0.conv1.weight": 2304, "rnn.weight_ih_l0": 320, "fc.weight": 500}
NAMES = "conv1.weight, layer1.0.conv1.weight, rnn.weight_ih_l0, fc.weight"
FACTS = ModelFacts(4000, 4000, (3556, 444), 0, 64, 2000, (10,), prunable=PRUNABLE)
BASE = {
    "name": "job",
    "model": {"kind": "cnn"},
    "data": {"kind": "digits", "global_batch": 64},
    "optimizer": {"kind": "sgd", "lr": 0.1, "momentum": 0.9},
    "budget": {"steps": 100},
}
ROUND = {"sparsity": 0.5, "sparse_steps": 40, "redense_steps": 30}


@pytest.fixture(autouse=True)
def storage(tmp_path, monkeypatch):
    """The model is not built; a model of FACTS is planned for."""
    monkeypatch.setattr(probe, "_ask", lambda *_: json.loads(json.dumps(asdict(FACTS))))
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    monkeypatch.chdir(tmp_path)


def planned(*overrides, rounds=(ROUND,), **dsd):
    """The plan of a job with these rounds; without rounds it has no dsd."""
    section = {"dsd": {"rounds": list(rounds), **dsd}} if rounds else {}
    return build_plan(build_job({**BASE, **section}, overrides), CLUSTER, Path.cwd())


def refused(*overrides, rounds=(ROUND,), **dsd):
    """Each problem's text, by its key."""
    with pytest.raises(JobError) as caught:
        planned(*overrides, rounds=rounds, **dsd)
    return {problem.key: str(problem) for problem in caught.value.problems}


def round_of(**changes):
    return {key: value for key, value in {**ROUND, **changes}.items() if value is not None}


def fingerprints(*overrides, **dsd):
    return {phase.name: phase.fingerprint for phase in planned(*overrides, **dsd).phases}


# -------------------------------------------------------------------------------------------------------- the phases


def test_two_rounds_as_in_deep_speech_2():
    second = {"sparsity": 0.25, "sparse_epochs": 2, "redense_epochs": 0.01, "sparse_lr_factor": 0.5}
    plan = planned(rounds=[ROUND, second], redense_lr_factor=0.2)
    told = [(phase.name, phase.kind, phase.first_step, phase.last_step, phase.lr) for phase in plan.phases]
    assert told == [
        ("dense", "dense", 0, 100, 0.1),
        ("sparse-1", "sparse", 100, 140, 0.1),
        ("redense-1", "redense", 140, 170, 0.2 * 0.1),
        ("sparse-2", "sparse", 170, 215, 0.5 * 0.1),  # 2 × 1437 / 64 = 44.9
        ("redense-2", "redense", 215, 216, 0.2 * 0.1),
    ]
    assert plan.steps == 216
    assert plan.fingerprint == plan.phases[-1].fingerprint
    assert len({phase.fingerprint for phase in plan.phases}) == 5
    assert [phase.fresh for phase in plan.phases] == [False, True, True, True, True]
    assert all(phase.deepspeed == plan.phases[0].deepspeed for phase in plan.phases)
    assert plan.phases[1].pruning.layers == dict.fromkeys(SIZES, 0.5)
    assert plan.phases[3].pruning.layers == dict.fromkeys(SIZES, 0.25)
    assert [phase.pruning is not None for phase in plan.phases] == [False, True, False, True, False]
    assert [plan.phase_before(phase) for phase in plan.phases] == [None, *plan.phases[:-1]]
    value = json.loads(json.dumps(plan.to_dict()))
    assert value["phases"][1]["pruning"] == {
        "structure": "weights",
        "criterion": "magnitude",
        "layers": dict.fromkeys(SIZES, 0.5),
        "seed": 0,
    }
    assert value["model"]["prunable"][0] == {"name": "conv1.weight", "shape": [16, 3, 3, 3], "kind": "convolution"}


def test_the_defaults_are_the_papers():
    sparse, redense = planned().phases[1:]
    assert (sparse.lr, redense.lr) == (0.1, 0.1 * 0.1)
    assert sparse.fresh and redense.fresh
    assert not any(phase.fresh for phase in planned(optimizer_state="kept").phases)


def test_a_round_may_end_sparse():
    plan = planned(rounds=[round_of(redense_steps=0), ROUND])
    assert [phase.name for phase in plan.phases] == ["dense", "sparse-1", "sparse-2", "redense-2"]
    assert plan.phase_before(plan.phases[2]) == plan.phases[1]


def test_the_schedule_begins_anew_in_each_phase():
    cosine = "optimizer.schedule={kind: cosine, final_factor: 0.1}"
    plan = planned(cosine)
    for phase, lr in zip(plan.phases, (0.1, 0.1, 0.01), strict=True):
        rate = learning_rate(plan.job, phase)
        assert (rate(0), rate(phase.steps)) == (pytest.approx(lr), pytest.approx(0.1 * lr))
        assert rate(phase.steps // 2) == pytest.approx(0.55 * lr)
    own = planned(cosine, schedule={"kind": "linear", "warmup_steps": 1})
    assert learning_rate(own.job, own.phases[0])(0) == pytest.approx(0.1)
    assert [learning_rate(own.job, own.phases[2])(step) for step in (0, 1, 30)] == pytest.approx([0.005, 0.01, 0.0])


def test_seeds_differ_from_round_to_round_and_follow_the_jobs():
    rounds = [round_of(criterion="random"), ROUND, ROUND]
    seeds = [[phase.pruning.seed for phase in planned(f"seed={seed}", rounds=rounds).phases[1::2]] for seed in (0, 1)]
    assert len({seed for of_job in seeds for seed in of_job}) == 6
    assert planned("seed=1", rounds=[ROUND]).phases[1].pruning.seed == seeds[1][0]


# ------------------------------------------------------------------------------------------------------- fingerprints


def test_the_dense_phase_is_that_of_a_job_without_dsd():
    assert fingerprints()["dense"] == planned(rounds=()).fingerprint
    assert fingerprints(rounds=[round_of(sparsity=0.7)], optimizer_state="kept")["dense"] == fingerprints()["dense"]


@pytest.mark.parametrize(
    "changes",
    [{"redense_steps": 31}, {"redense_lr_factor": 0.5}, {"redense_steps": 0}],
)
def test_what_acts_later_changes_no_phase_before_it(changes):
    one, other = fingerprints(), fingerprints(rounds=[round_of(**changes)])
    assert one["sparse-1"] == other["sparse-1"]
    assert one["redense-1"] != other.get("redense-1")


@pytest.mark.parametrize(
    ("changes", "dsd"),
    [
        ({"sparsity": 0.25}, {}),
        ({"sparse_steps": 41}, {}),
        ({"sparse_lr_factor": 0.5}, {}),
        ({"structure": "channels"}, {}),
        ({"criterion": "random"}, {}),
        ({}, {"sparse_lr_factor": 0.5}),
        ({}, {"optimizer_state": "kept"}),
        ({}, {"schedule": {"kind": "linear"}}),
        ({}, {"exclude": ["fc"]}),
        ({}, {"exclude_first_conv": True}),
    ],
)
def test_what_acts_in_a_sparse_phase_changes_it_and_what_follows(changes, dsd):
    one, other = fingerprints(), fingerprints(rounds=[round_of(**changes)], **dsd)
    assert one["sparse-1"] != other["sparse-1"]
    assert one["redense-1"] != other["redense-1"], "it goes on from other weights"


@pytest.mark.parametrize(
    ("changes", "dsd"),
    [
        ({"sparsity": {"*": 0.5}}, {}),
        ({"sparsity": {"conv1": 0.5, "layer?.0.conv*": 0.5, "rnn*": 0.5, "fc.weight": 0.5}}, {}),
        ({}, {"schedule": {"kind": "constant"}}),
        ({"sparse_lr_factor": 1.0, "redense_lr_factor": 0.1}, {}),
        ({"sparse_steps": None, "sparse_epochs": 40 * 64 / 1437}, {}),
    ],
)
def test_what_means_the_same_is_the_same(changes, dsd):
    assert fingerprints(rounds=[round_of(**changes)], **dsd) == fingerprints()


def test_a_round_that_gives_back_weights_of_the_sparse_phase_before_it_says_so():
    said = "sparse-2 follows sparse-1 directly and prunes less of"
    sparse = round_of(redense_steps=0)
    found = planned(rounds=[sparse, round_of(sparsity={"fc": 0.6, "*": 0.25})]).notes
    names = NAMES.removesuffix(", fc.weight")
    assert any(note.startswith(f"{said} {names}: which zeros are trained again") for note in found)
    for rounds in ([sparse, round_of(sparsity=0.75)], [ROUND, round_of(sparsity=0.25)]):
        assert not any(said in note for note in planned(rounds=rounds).notes)


def test_excluding_and_not_naming_are_the_same():
    named = fingerprints(rounds=[round_of(sparsity={"fc": 0.5, "rnn": 0.5})])
    assert named == fingerprints(exclude=["*conv1"])
    assert named == fingerprints(rounds=[round_of(sparsity={"*conv1": 0.0, "*": 0.5})])


def test_only_a_random_criterion_depends_on_its_seed():
    rounds = [ROUND, round_of(criterion="random")]
    plan = planned(rounds=rounds)
    assert plan.phases[1].pruning.seed != plan.phases[3].pruning.seed
    again = planned(rounds=[ROUND, ROUND])
    assert again.phases[2].fingerprint == plan.phases[2].fingerprint


def test_the_control_without_a_mask():
    plan = planned(rounds=[round_of(sparsity=0)])
    assert plan.phases[1].pruning.layers == {}
    assert plan.memory.masks == 0
    assert any("sparse-1 prunes nothing (sparsity 0): the control" in note for note in plan.notes)
    text = plan_table(plan)
    assert "lr 0.1 (constant), nothing pruned, optimizer fresh" in text
    assert "lr 0.01 (constant), all weights train on, optimizer fresh" in text
    assert fingerprints(rounds=[round_of(sparsity={"fc": 0.0})]) == fingerprints(rounds=[round_of(sparsity=0)])


# ------------------------------------------------------------------------------------------------------------- layers


def resolved(round_, **dsd):
    config = build_job({**BASE, "dsd": {"rounds": [round_of(**round_)], **dsd}}, ()).dsd
    return resolve_layers(config, config.rounds[0], PRUNABLE)


def test_the_first_pattern_that_matches_counts():
    assert resolved({"sparsity": {"fc.weight": 0.25, "*conv1*": 0.75}}) == {
        "conv1.weight": 0.75,
        "layer1.0.conv1.weight": 0.75,
        "fc.weight": 0.25,
    }
    assert resolved({"sparsity": {"layer1*": 0.25, "*conv1": 0.75}}) == {
        "conv1.weight": 0.75,
        "layer1.0.conv1.weight": 0.25,
    }


def test_what_is_excluded_stays_dense():
    assert set(resolved({}, exclude=["rnn", "fc.*"], exclude_first_conv=True)) == {"layer1.0.conv1.weight"}


def test_n_of_m_prunes_where_m_divides_the_inputs():
    assert resolved({"sparsity": None, "structure": "1:4"}) == {"layer1.0.conv1.weight": 0.75, "rnn.weight_ih_l0": 0.75}
    plan = planned(rounds=[round_of(sparsity=None, structure="1:4")])
    note = "sparse-1 leaves conv1.weight, fc.weight dense: 4 does not divide the number of inputs"
    assert any(note in text for text in plan.notes)


def test_an_unquoted_structure_is_read_as_it_is_meant():
    plan = planned("dsd.rounds.0={structure: 2:4, sparse_steps: 40, redense_steps: 30}")
    assert plan.phases[1].pruning.structure == "2:4"


def test_what_is_too_little_to_prune_stays_dense():
    plan = planned(rounds=[round_of(sparsity=0.0012)])
    assert set(plan.phases[1].pruning.layers) == {"conv1.weight", "layer1.0.conv1.weight", "fc.weight"}
    assert any("sparse-1 prunes nothing of rnn.weight_ih_l0: the share is less" in note for note in plan.notes)


@pytest.mark.parametrize(
    ("share", "structure", "pruned"),
    [(0.5, "weights", 1152), (0.3, "weights", 691), (0.5, "2:4", 1152), (0.3, "channels", 5 * 144)],
)
def test_how_many_weights_are_pruned(share, structure, pruned):
    weight = PRUNABLE[1]
    assert count_pruned(weight, share, structure) == pruned
    values = torch.randn(weight.shape, generator=torch.Generator().manual_seed(0))
    mask = select_mask(weight.name, values, Pruning(structure, "magnitude", {weight.name: share}, 0))
    assert int((~mask).sum()) == pruned


# -------------------------------------------------------------------------------------------------------- what it costs


@pytest.mark.parametrize(
    ("parallel", "masks", "on_host"),
    [
        ("{}", 4000, 0),
        ("{workers: 2, zero: 1}", 2000, 0),
        ("{workers: 2, zero: 3}", 2000, 0),
        ("{workers: 2, zero: 2, offload: cpu}", 0, 2000),
    ],
)
def test_masks_are_a_byte_beside_each_master(parallel, masks, on_host):
    memory, dense = planned(f"parallel={parallel}").memory, planned(f"parallel={parallel}", rounds=()).memory
    assert (memory.masks, memory.host_masks) == (masks, on_host)
    assert memory == replace(dense, masks=masks, host_masks=on_host)
    assert memory.device_bytes == dense.device_bytes + masks
    assert memory.host_bytes == dense.host_bytes + on_host


def test_masks_on_a_parameter_server():
    server = "parallel={mode: parameter_server, workers: 2, shards: 3}"
    memory, dense = planned(server).memory, planned(server, rounds=()).memory
    assert (memory.masks, memory.server - dense.server) == (4000, 1334)
    assert "each shard: weights, masks and optimizer state" in plan_table(planned(server))


def test_masks_are_shown_only_where_there_are_some():
    assert "buckets 0 B, masks 3.9 KiB" in plan_table(planned())
    offload = planned("parallel={zero: 1, offload: cpu}")
    assert "masks 3.9 KiB" in next(line for line in plan_table(offload).splitlines() if "host memory  " in line)
    assert "masks" not in plan_table(planned(rounds=()))


# ----------------------------------------------------------------------------------------------------- what is printed


def test_people_read_the_schedule():
    second = round_of(sparsity={"fc": 0.2, "*conv1": 0.4}, criterion="random")
    lines = plan_table(planned("optimizer.schedule.kind=cosine", rounds=[ROUND, second])).splitlines()
    assert max(map(len, lines)) <= 120
    text = " ".join(" ".join(lines).split())
    for part in (
        "schedule cosine in the dense phase: 0.1 at step 0, 0.0854 at step 25,",
        "phase dense steps 0 to 100, lr 0.1 → 0 (cosine), stored under",
        "phase sparse-1 steps 100 to 140, lr 0.1 → 0 (cosine), 50% of 4 layers pruned: 1,778 of 3,556 prunable weights "
        "are zero, optimizer fresh, stored under",
        f"pruned 50%: {NAMES}",
        "phase redense-1 steps 140 to 170, lr 0.01 → 0 (cosine), all weights train again, pruned ones from zero, "
        "optimizer fresh, stored under",
        "20% to 40% of 3 layers pruned at random: 1,195 of 3,556 prunable weights are zero",
        "pruned 40%: conv1.weight, layer1.0.conv1.weight",
        "pruned 20%: fc.weight",
        "left dense rnn.weight_ih_l0",
        "note: 240 steps of 64 examples in all 5 phases are 10.7 epochs of 1437 examples",
    ):
        assert part in text


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"structure": "channels"}, "50% of the channels of 4 layers pruned: 1,778 of"),
        ({"structure": "2:4", "sparsity": None}, "50% (2:4) of 2 layers pruned: 1,312 of"),
        ({"sparsity": {"fc": 0.333}}, "33.3% of 1 layer pruned: 166 of"),
    ],
)
def test_structures_in_the_plan(changes, said):
    assert said in plan_table(planned(rounds=[round_of(**changes)]))


def test_long_lists_of_layers_are_shortened(monkeypatch):
    many = tuple(PrunableWeight(f"layer{index}.weight", (8, 8), "linear") for index in range(20))
    monkeypatch.setattr(probe, "_ask", lambda *_: asdict(replace(FACTS, prunable=many)))
    text = plan_table(planned(exclude=["layer1?"]))
    for first in ("layer0.weight", "layer10.weight"):
        line = next(line for line in text.splitlines() if f" {first}, " in line)
        assert line.endswith("weight, … (10)")


def test_a_warm_up_in_the_plan():
    plan = planned(schedule={"kind": "linear", "warmup_steps": 3, "final_factor": 0.5})
    assert "lr 0.01 → 0.005 (linear after 3 steps of warm-up)" in plan_table(plan)


# ----------------------------------------------------------------------------------------------------- what is refused


@pytest.mark.parametrize(
    ("changes", "key", "said"),
    [
        ({"sparsity": 1.0}, "sparsity", "1.0 must be less than 1"),
        ({"sparsity": -0.1}, "sparsity", "-0.1 must be at least 0"),
        ({"sparsity": "half"}, "sparsity", "half must be a number or a mapping of keys to values, not text"),
        ({"sparsity": {"fc": 1.0}}, "sparsity.fc", "1.0 must be less than 1"),
        ({"sparsity": {"fc": "all"}}, "sparsity.fc", "all must be a number, not text"),
        ({"sparsity": {}}, "sparsity", "names no layer; give one share for all, or some patterns"),
        ({"sparsity": None}, "sparsity", "is missing, and structure: weights does not decide it"),
        ({"sparsity": None, "structure": "channels"}, "sparsity", "structure: channels does not decide it"),
        ({"structure": "2:4"}, "sparsity", "0.5 is given beside structure: 2:4, which decides it"),
        ({"sparsity": None, "structure": "4:4"}, "structure", "4:4 keeps 4 of every 4 weights, which prunes nothing"),
        ({"sparsity": None, "structure": "8:4"}, "structure", 'use a smaller N, e.g. "2:4"'),
        ({"structure": "2/4"}, "structure", "2/4 must be 'weights', 'channels' or 'N:M', e.g. '2:4'"),
        ({"sparse_steps": None}, "sparse_steps", "is missing: the sparse phase needs a length; give it, or sparse_ep"),
        ({"sparse_steps": 0}, "sparse_steps", "0 must be greater than 0"),
        ({"sparse_epochs": 1}, "sparse_epochs", "1.0 is given beside sparse_steps: 40, and only one of them can hold"),
        ({"redense_steps": None}, "redense_steps", "redense_epochs, or 0 to end the round sparse"),
        ({"redense_epochs": 1}, "redense_epochs", "is given beside redense_steps: 30"),
        ({"redense_steps": 0, "redense_lr_factor": 0.1}, "redense_lr_factor", "0.1 has no effect with redense_steps"),
        ({"sparsity": 0, "criterion": "random"}, "criterion", "has no effect: with sparsity 0 nothing is pruned"),
        ({"sparsity": {"*": 0}, "structure": "channels"}, "structure", "has no effect: with sparsity 0"),
        ({"sparse_steps": 2**40}, "", "dsd.rounds: make 1099511627976 steps with the budget"),
        ({"sparse_steps": None, "sparse_epochs": 1e308}, "sparse_epochs", "more than any run can take; use at most"),
        ({"sparsity": {"fc": 0.5, "convv1": 0.5}}, "sparsity.convv1", "0.5 matches no layer that can be pruned; these"),
        ({"sparsity": {"convv1": 0.5}}, "sparsity.convv1", f"these are {NAMES}; did you mean conv1?"),
        ({"sparsity": {"bn": 0.5}}, "sparsity.bn", f"these are {NAMES}"),
        ({"sparsity": {"*": 0.5, "fc": 0.3}}, "sparsity.fc", "0.3 decides nothing: dsd excludes fc.weight, or"),
        ({"structure": "7:9", "sparsity": None}, "structure", "9 does not divide the inputs of any (conv1.weight 3, "),
        ({"structure": "channels", "sparsity": 0.96}, "sparsity", "prunes all 10 channels of fc.weight; use at most 0"),
        ({"sparsity": {"r*": 0.9999}}, "sparsity.r*", "prunes all 320 weights of rnn.weight_ih_l0; use at most 0.996"),
    ],
)
def test_a_wrong_round_is_refused(changes, key, said):
    found = refused(rounds=[ROUND, round_of(**changes)])
    where = f"dsd.rounds.1.{key}" if key else "dsd.rounds"
    assert list(found) == [where]
    assert said in found[where]


@pytest.mark.parametrize(
    ("dsd", "key", "said"),
    [
        ({"exclude": ["layr1.0.conv1"]}, "dsd.exclude.0", f"these are {NAMES}; did you mean layer1.0.conv1?"),
        ({"exclude": ["fc", "bn*"]}, "dsd.exclude.1", "bn* matches no layer that can be pruned"),
        ({"exclude": ["*"]}, "dsd.exclude", f"leaves nothing to prune: it excludes {NAMES}"),
        ({"rounds": []}, "dsd.rounds", "must be of at least 1 entry"),
        ({"schedule": {"kind": "step"}}, "dsd.schedule.milestones", "needs an entry for kind: step"),
        ({"schedule": {"gamma": 0.5}}, "dsd.schedule.gamma", "has no effect with kind: constant"),
        (
            {"schedule": {"warmup_steps": 30}},
            "dsd.schedule.warmup_steps",
            "30 never ends in a phase of 30 steps (dsd.rounds.0.redense_steps or _epochs); use at most 29",
        ),
        ({"redense_lr_factr": 0.1}, "dsd.redense_lr_factr", "did you mean 'redense_lr_factor'?"),
        (
            {"redense_lr_factor": 0.5, "rounds": [{"sparsity": 0.5, "sparse_steps": 40, "redense_steps": 0}]},
            "dsd.redense_lr_factor",
            "0.5 has no effect: every round has its own or no redense phase",
        ),
    ],
)
def test_a_wrong_section_is_refused(dsd, key, said):
    with pytest.raises(JobError) as caught:
        build_plan(build_job({**BASE, "dsd": {"rounds": [ROUND], **dsd}}, ()), CLUSTER, Path.cwd())
    assert [problem.key for problem in caught.value.problems] == [key]
    assert said in str(caught.value.problems[0])


def test_a_warm_up_that_fits_the_budget_only_is_refused():
    found = refused("optimizer.schedule.warmup_steps=35")
    assert list(found) == ["optimizer.schedule.warmup_steps"]
    assert "use at most 29 or give these phases a dsd.schedule of their own" in found["optimizer.schedule.warmup_steps"]
    assert planned("optimizer.schedule.warmup_steps=35", schedule={"kind": "constant"}).steps == 170


@pytest.mark.parametrize("key", ["budget.epochs", "dsd.rounds.0.sparse_epochs"])
def test_too_many_epochs_are_refused_whatever_else_there_is(key):
    rounds = [round_of(sparse_steps=None, sparse_epochs=1.0)]
    assert set(refused("budget={epochs: 1.0}", f"{key}=1.0e+308", rounds=rounds)) == {key}


def test_all_problems_of_the_rounds_come_together():
    found = refused(
        rounds=[
            round_of(sparsity=None, sparse_steps=None),
            round_of(redense_steps=None, sparse_epochs=1),
            round_of(structure="2:2"),
        ],
        schedule={"gamma": 0.5},
    )
    assert list(found) == [
        "dsd.schedule.gamma",
        "dsd.rounds.0.sparse_steps",
        "dsd.rounds.0.sparsity",
        "dsd.rounds.1.sparse_epochs",
        "dsd.rounds.1.redense_steps",
        "dsd.rounds.2.sparsity",
        "dsd.rounds.2.structure",
    ]
    patterns = refused(rounds=[round_of(sparsity={"x": 0.1, "y": 0.2}), round_of(sparsity={"z": 0.1})])
    assert set(patterns) == {"dsd.rounds.0.sparsity.x", "dsd.rounds.0.sparsity.y", "dsd.rounds.1.sparsity.z"}


@pytest.mark.parametrize(
    ("prunable", "dsd", "key", "said"),
    [
        (
            (),
            {},
            "dsd",
            "finds nothing to prune: but for biases, norms and embeddings the model has no trainable weight",
        ),
        (PRUNABLE[3:], {"exclude_first_conv": True}, "dsd.exclude_first_conv", "layers are fc.weight; leave it out"),
        (PRUNABLE[:1], {"exclude_first_conv": True}, "dsd.exclude_first_conv", "it excludes conv1.weight"),
    ],
)
def test_a_model_with_nothing_to_prune_is_refused(monkeypatch, prunable, dsd, key, said):
    monkeypatch.setattr(probe, "_ask", lambda *_: asdict(replace(FACTS, prunable=prunable)))
    found = refused(**dsd)
    assert list(found) == [key]
    assert said in found[key]


# ---------------------------------------------------------------------------------------------- what can be pruned


def built(shape, **section):
    """A model on the meta device, which costs nothing."""
    facts = DataFacts(100, 0, 10, shape, 10, (), (), "")
    with torch.device("meta"):
        return build_model(TypeAdapter(ModelConfig).validate_python(section), facts, 0)


def named(model):
    return {weight.name: (weight.kind, weight.shape) for weight in prunable_weights(model)}


def test_layers_of_tempers_own_models():
    assert named(built((1, 8, 8), kind="cnn", channels=[4, 6], hidden=5)) == {
        "0.weight": ("convolution", (4, 1, 3, 3)),
        "3.weight": ("convolution", (6, 4, 3, 3)),
        "7.weight": ("linear", (5, 24)),
        "9.weight": ("linear", (10, 5)),
    }
    assert named(built((6,), kind="mlp", hidden=[3])) == {
        "1.weight": ("linear", (3, 6)),
        "3.weight": ("linear", (10, 3)),
    }
    resnet = named(built((3, 8, 8), kind="resnet", depth=8))
    assert [kind for kind, _ in resnet.values()] == ["convolution"] * 7 + ["linear"]
    gpt = named(built((6,), kind="gpt", layers=1, heads=2, width=8))
    assert set(gpt.values()) == {("linear", shape) for shape in ((24, 8), (8, 8), (32, 8), (8, 32), (10, 8))}
    assert not any("embedding" in name for name in gpt)


@pytest.mark.parametrize(
    ("name", "size", "convolutions", "linear"),
    [("resnet18", 32, 20, 1), ("googlenet", 32, 59, 5), ("vgg11_bn", 32, 8, 3)],
)
def test_layers_of_torchvisions_networks(name, size, convolutions, linear):
    kinds = [kind for kind, _ in named(built((3, size, size), kind="torchvision", name=name)).values()]
    assert (kinds.count("convolution"), kinds.count("linear"), len(kinds)) == (
        convolutions,
        linear,
        convolutions + linear,
    )


class Captioner(nn.Module):
    """An embedding, an LSTM, and an output layer tied to nothing; the image's features come through a linear layer."""

    def __init__(self):
        super().__init__()
        self.words = nn.Embedding(20, 8)
        self.image = nn.Linear(5, 8)
        self.rnn = nn.LSTM(8, 6, num_layers=2, proj_size=4, batch_first=True)
        self.attention = nn.MultiheadAttention(4, 2)
        self.head = nn.Linear(4, 20)


def test_layers_of_a_captioner():
    assert named(Captioner()) == {
        "image.weight": ("linear", (8, 5)),
        "rnn.weight_ih_l0": ("recurrent", (24, 8)),
        "rnn.weight_hh_l0": ("recurrent", (24, 4)),
        "rnn.weight_hr_l0": ("recurrent", (4, 6)),
        "rnn.weight_ih_l1": ("recurrent", (24, 4)),
        "rnn.weight_hh_l1": ("recurrent", (24, 4)),
        "rnn.weight_hr_l1": ("recurrent", (4, 6)),
        "attention.in_proj_weight": ("other", (12, 4)),
        "attention.out_proj.weight": ("linear", (4, 4)),
        "head.weight": ("linear", (20, 4)),
    }


class RMSNorm2d(nn.Module):
    def __init__(self):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(4, 1, 1))


class Mixture(nn.Module):
    """A layer of a user's own, with a gate that is no weight and a bias of two dimensions."""

    def __init__(self):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(3, 4, 5))
        self.router_weight = nn.Parameter(torch.ones(3, 4))
        self.bias = nn.Parameter(torch.ones(3, 4))
        self.gate = nn.Parameter(torch.ones(3, 4))


def test_layers_of_ones_own():
    network = nn.Sequential(Mixture(), RMSNorm2d(), nn.LayerNorm((3, 4)), nn.Bilinear(2, 3, 4), nn.LSTMCell(2, 3))
    network.append(nn.Linear(3, 3).requires_grad_(False))
    assert named(network) == {
        "0.weight": ("other", (3, 4, 5)),
        "0.router_weight": ("other", (3, 4)),
        "3.weight": ("linear", (4, 2, 3)),
        "4.weight_ih": ("recurrent", (12, 2)),
        "4.weight_hh": ("recurrent", (12, 3)),
    }


def test_what_is_tied_to_an_embedding_is_not_pruned():
    network = nn.Sequential(nn.Linear(4, 7, bias=False), nn.Linear(7, 4), nn.Linear(4, 4), nn.Linear(4, 4))
    network.append(nn.Embedding(7, 4))
    network[4].weight = network[0].weight
    network[3].weight = network[2].weight
    assert list(named(network)) == ["1.weight", "2.weight"], "of two linear layers that share one the first name counts"


def test_the_probe_tells_of_the_whole_layers():
    tensor = {"size": 2, "split": [["*.attention", "heads"], ["head", "output_activations"]]}
    question = {"model": {"kind": "gpt", "layers": 1, "heads": 2, "width": 8}, "shape": [6], "num_classes": 10}
    split, whole = (answer({**question, "tensor": parts, "timing": None})["facts"] for parts in (tensor, None))
    assert split["prunable"] == whole["prunable"]
    assert {"name": "head.weight", "shape": (10, 8), "kind": "linear"} in whole["prunable"]


# ------------------------------------------------------------------------------------------------------------ composing


def test_it_composes_with_everything():
    rows = compose_table().splitlines()
    assert rows[0].endswith("| dense-sparse-dense |")
    assert all(row.endswith("| ✓ |") for row in rows[2:])
    assert conflict("pipeline", "dense-sparse-dense") is None
    job = compose("ZeRO-3", "dense-sparse-dense")
    assert job is not None and job.dsd is not None
    assert candidates(job.dsd, PRUNABLE) == list(PRUNABLE)
