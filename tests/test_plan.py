"""The plan: mesh, batches, fingerprints, DeepSpeed's configuration, memory, and what is refused before the start."""

import hashlib
import json
import subprocess
import sys
from dataclasses import asdict, replace
from pathlib import Path

import pytest

from temper.config.load import build_job
from temper.errors import JobError, Problem
from temper.plan import mesh, probe
from temper.plan.build import build_plan
from temper.plan.deepspeed_config import deepspeed_config
from temper.plan.facts import data_facts
from temper.plan.memory import plan_memory
from temper.plan.mesh import BatchPlan, ClusterShape, MeshPlan, check_mesh, local_cluster, plan_batch, plan_mesh
from temper.plan.phases import fingerprint, ingredients, plan_steps
from temper.plan.probe import ModelFacts, Weights, model_facts
from temper.plan.show import plan_table
from temper.plan.targets import check_targets, find_module, hash_module

CLUSTER = ClusterShape(nodes=1, cpus=8.0, gpus=0.0)
FACTS = ModelFacts(
    num_parameters=1000,
    num_trainable=1000,
    parameter_sizes=(600, 300, 100),
    buffer_bytes=40,
    activation_bytes_per_example=64,
    forward_flops_per_example=2000,
    output_shape=(10,),
)
BASE = {
    "name": "job",
    "model": {"kind": "cnn"},
    "data": {"kind": "digits", "global_batch": 64},
    "optimizer": {"kind": "sgd", "lr": 0.1, "momentum": 0.9},
    "budget": {"steps": 100},
}


@pytest.fixture
def storage(tmp_path, monkeypatch):
    """A storage folder, and a probe that answers FACTS without starting a process."""
    monkeypatch.setattr(probe, "_ask", lambda *_: json.loads(json.dumps(asdict(FACTS))))
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    monkeypatch.chdir(tmp_path)
    return tmp_path / "runs"


def job_of(*overrides, **sections):
    return build_job({**BASE, **sections}, overrides)


def planned(*overrides, cluster=CLUSTER):
    return build_plan(job_of(*overrides), cluster, Path.cwd())


def refused(*overrides, cluster=CLUSTER):
    """Each problem's text, by its key."""
    with pytest.raises(JobError) as caught:
        planned(*overrides, cluster=cluster)
    return {problem.key: str(problem) for problem in caught.value.problems}


# ------------------------------------------------------------------------------------------------- mesh and batches


@pytest.mark.parametrize(
    ("global_batch", "data", "limit", "plan"),
    [
        (256, 2, None, BatchPlan(256, 128, 128, 1)),
        (256, 2, 128, BatchPlan(256, 128, 128, 1)),
        (256, 2, 127, BatchPlan(256, 128, 64, 2)),
        (96, 1, 40, BatchPlan(96, 96, 32, 3)),
        (14, 2, 4, BatchPlan(14, 7, 1, 7)),
        (30, 2, 1000, BatchPlan(30, 15, 15, 1)),
        (2**40, 1, 2**39 - 1, BatchPlan(2**40, 2**40, 2**38, 4)),
    ],
)
def test_batches_take_the_fewest_equal_micro_batches_within_the_limit(global_batch, data, limit, plan):
    assert plan_batch(global_batch, data, limit) == plan
    assert plan.micro_batch * plan.accumulation * data == global_batch


def test_divisors_are_complete():
    for number in range(1, 200):
        assert mesh.divisors(number) == [d for d in range(1, number + 1) if number % d == 0]


@pytest.mark.parametrize(
    ("device", "gpus", "chosen"), [("auto", 0, "cpu"), ("auto", 4, "cuda"), ("cpu", 4, "cpu"), ("cuda", 4, "cuda")]
)
def test_the_device_is_a_gpu_where_there_is_one_unless_told_otherwise(device, gpus, chosen):
    parallel = job_of(f"parallel={{workers: 4, device: {device}}}").parallel
    shape = ClusterShape(1, 8.0, float(gpus))
    assert check_mesh(parallel, shape) == []
    assert plan_mesh(parallel, shape) == MeshPlan(data=4, pipeline=1, device=chosen)
    assert plan_mesh(parallel, shape).world_size == 4


@pytest.mark.parametrize(
    ("parallel", "shape", "key", "said"),
    [
        ("{device: cuda}", ClusterShape(1, 8, 0), "parallel.device", "this cluster has none; use cpu or auto"),
        ("{workers: 4}", ClusterShape(1, 8, 3), "parallel.workers", "the cluster has 3; use workers: 3 or device: cpu"),
        ("{workers: 3}", ClusterShape(1, 2, 0), "parallel.workers", "use workers: 2 or cpus_per_worker: 0.66"),
        ("{cpus_per_worker: 4}", ClusterShape(1, 2, 0), "parallel.workers", "use cpus_per_worker: 2"),
    ],
)
def test_what_the_cluster_cannot_give_is_refused(parallel, shape, key, said):
    problems = check_mesh(job_of(f"parallel={parallel}").parallel, shape)
    assert [problem.key for problem in problems] == [key]
    assert said in str(problems[0])


@pytest.mark.parametrize(
    ("visible", "present", "counted"),
    [(None, 2, 2), ("0", 2, 1), ("", 2, 0), ("-1", 2, 0), ("0,1,2", 2, 2), (None, 0, 0)],
)
def test_gpus_are_counted_without_torch(tmp_path, monkeypatch, visible, present, counted):
    for index in range(present):
        (tmp_path / f"0000:0{index}").mkdir()
    monkeypatch.setattr(mesh, "_NVIDIA_FOLDER", tmp_path)
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    if visible is not None:
        monkeypatch.setenv("CUDA_VISIBLE_DEVICES", visible)
    assert local_cluster().gpus == counted
    assert local_cluster().cpus >= 1


# ---------------------------------------------------------------------------------------------------- the whole plan


def test_a_plan_is_plain_json(storage):
    plan = planned("precision.dtype=fp16", "parallel={workers: 2, zero: 2, micro_batch: 16}")
    value = json.loads(json.dumps(plan.to_dict()))
    mesh_plan = {"data": 2, "pipeline": 1, "tensor": 1, "device": "cpu", "cut": [], "splits": {}}
    assert value["mesh"] == {**mesh_plan, "world_size": 2}
    assert value["stages"] == []
    assert value["batch"] == {"global_batch": 64, "rank_batch": 32, "micro_batch": 16, "accumulation": 2}
    assert [phase["name"] for phase in value["phases"]] == ["dense"]
    assert (plan.phases[0].first_step, plan.phases[0].steps) == (0, 100)
    assert value["model"]["num_parameters"] == 1000
    assert str(plan.run_folder) == value["run_folder"] == f"runs/job-{plan.fingerprint[:10]}"
    assert plan.phase_folder(plan.phases[0]) == Path("runs/phases") / plan.phases[0].fingerprint


def test_people_read_what_will_happen(storage):
    text = plan_table(
        planned("precision.dtype=fp16", "parallel={workers: 2, zero: 2}", "optimizer.schedule.kind=cosine")
    )
    for part in (
        "data 2 × pipeline 1 × tensor 1 = 2 ranks on cpu",
        "64 = 2 ranks × 1 micro-batch × 32 examples",
        "ZeRO stage 2",
        "cosine: 0.1 at step 0",
        "steps 0 to 100",
        "capability override",
        "1×8×8, 10 classes",
    ):
        assert part in text


SPLITS = {f"layer{number}.conv": "output_maps" for number in range(12)} | {"fc": "input_activations"}
SPLIT_FACTS = replace(FACTS, splits=SPLITS, part=Weights(520, (300, 150, 70), 40))


def test_tensor_ranks_hold_their_parts(storage, monkeypatch):
    monkeypatch.setattr(probe, "_ask", lambda *_: json.loads(json.dumps(asdict(SPLIT_FACTS))))
    plan = planned("parallel={workers: 2, tensor: 2, zero: 1}")
    assert (plan.mesh.tensor, plan.mesh.world_size, plan.mesh.splits) == (2, 4, SPLITS)
    assert plan.memory.parameters == 4 * 520 + 40
    assert plan.memory.optimizer_state == 4 * 260 * 2, "ZeRO shards a rank's part over the replicas"
    assert plan.phases[0].deepspeed["zero_optimization"]["reduce_bucket_size"] == 520
    text = plan_table(plan)
    for part in (
        "data 2 × pipeline 1 × tensor 2 = 4 ranks on cpu",
        "output_maps: layer0.conv, layer1.conv, layer2.conv, … (12)",
        "input_activations: fc\n",
        "GFLOP in a step on every 2 tensor ranks together",
        "64 = 2 replicas × 1 micro-batch × 32 examples",
    ):
        assert part in text


def test_patterns_are_asked_in_their_order(storage, monkeypatch):
    asked = []
    monkeypatch.setattr(probe, "_ask", lambda question, *_: asked.append(question) or asdict(SPLIT_FACTS))
    patterns = ("a*: output_maps", "b*: input_maps")
    for order in (patterns, patterns[::-1]):
        planned(f"parallel={{tensor: 2, split: {{{', '.join(order)}}}}}")
    assert [question["tensor"]["split"][0][0] for question in asked] == ["a*", "b*"], "the first that matches counts"
    planned()
    assert asked[-1]["tensor"] is None


SERVER = "parallel={mode: parameter_server, workers: 2, shards: 3, n_push: 4, n_fetch: 2, max_staleness: 5}"


def test_a_parameter_server_in_the_plan(storage):
    plan = planned(SERVER, "parallel.warm_start_steps=10")
    assert plan.mesh == MeshPlan(2, 1, "cpu")
    assert plan.phases[0].deepspeed == {}
    text = plan_table(plan)
    for part in (
        "2 workers on cpu, each on its own, and a parameter server of 3 shards",
        "3 shards of 334 parameters and their optimizer state",
        "fetch every 2 steps, push every 4 steps; a worker may be ahead of the slowest by at most 5 pushes",
        "one worker alone for 10 steps",
        "64 = 2 workers × 32 examples",
        "server memory  2.6 KiB in each shard: weights and optimizer state",
        "note: workers of a parameter server do not wait for each other",
    ):
        assert part in text
    assert "sharding" not in text


def test_a_server_holds_the_state_and_workers_add_up_between_pushes(storage):
    memory = planned(SERVER).memory
    assert (memory.parameters, memory.gradients, memory.optimizer_state) == (4 * 1000 + 40, 2 * 4 * 1000, 0)
    assert memory.server == 4 * 334 * 2, "weights and momentum"
    assert planned("parallel={mode: parameter_server}").memory.gradients == 4 * 1000


@pytest.mark.parametrize(
    ("precision", "said"),
    [
        ("{dtype: bf16, master_weights: false}", "bf16, no master weights\n"),
        ("{dtype: fp16, loss_scale: 8, fp32_accumulation: false}", "fp16, loss scale 8, no fp32 accumulation\n"),
        ("{dtype: fp16, at_min_scale: hold, min_scale: 4}", "doubled after 1000 clean steps, at scale 4 skips steps\n"),
        ("{dtype: fp16, loss_scale: 1, underflow_every: 7}", "flushed gradients counted every 7 steps\n"),
    ],
)
def test_precision_in_the_plan(storage, precision, said):
    assert said in plan_table(planned(f"precision={precision}"))


def test_tf32_without_a_gpu_is_refused_before_the_start(storage):
    with pytest.raises(JobError, match=r"precision.dtype: tf32 needs a GPU, and the job runs on CPUs; use fp32"):
        planned("precision.dtype=tf32")


def test_where_a_run_backs_off_to_is_part_of_its_fingerprint(storage):
    back_off = "precision={dtype: fp16, at_min_scale: back_off}"
    often, seldom = (planned(back_off, f"budget.checkpoint_every={steps}").fingerprint for steps in (10, 20))
    assert often != seldom
    hold = "precision={dtype: fp16, at_min_scale: hold}"
    often, seldom = (planned(hold, f"budget.checkpoint_every={steps}").fingerprint for steps in (10, 20))
    assert often == seldom


@pytest.mark.parametrize(("epochs", "batch", "steps"), [(1, 64, 22), (2.5, 64, 56), (0.001, 64, 1), (3, 1437, 3)])
def test_batches_run_on_across_epochs(epochs, batch, steps):
    job = job_of(f"budget={{epochs: {epochs}}}", f"data.global_batch={batch}")
    assert plan_steps(job, data_facts(job.data, Path.cwd())) == steps


ROWS = "data={kind: python, global_batch: 8, target: json:loads, train_examples: 64, test_examples: 8, shape: [9, 4]}"
CTC = [ROWS, "evaluation.metrics=[]", "model={kind: python, target: json:loads}"]


@pytest.mark.parametrize(
    ("shape", "loss", "key", "said"),
    [
        ((9, 4), "{kind: ctc, blank: 4}", "loss.blank", "4 is none of the model's 4 classes; use 0 to 3"),
        (
            (4,),
            "{kind: ctc}",
            "model",
            "outputs of the shape [4] per example, and loss.kind: ctc needs (frames, classes)",
        ),
    ],
)
def test_ctc_needs_a_model_of_frames(storage, monkeypatch, shape, loss, key, said):
    facts = replace(FACTS, output_shape=shape)
    monkeypatch.setattr(probe, "_ask", lambda *_: json.loads(json.dumps(asdict(facts))))
    assert said in refused(*CTC, f"loss={loss}")[key]


def test_ctc_is_planned_without_metrics(storage, monkeypatch):
    facts = replace(FACTS, output_shape=(9, 4))
    monkeypatch.setattr(probe, "_ask", lambda *_: json.loads(json.dumps(asdict(facts))))
    assert "ctc; metrics: none" in plan_table(planned(*CTC, "loss={kind: ctc, blank: 3}"))


def test_epochs_are_of_the_examples_with_a_label_unless_a_teacher_knows_the_others(storage):
    job = job_of("data={kind: digits, global_batch: 32, holdout: 137, labels: 0.1}", "budget={epochs: 2}")
    alone, taught = (data_facts(job.data, Path.cwd(), taught=taught) for taught in (False, True))
    assert (alone.train_examples, alone.left_out_examples) == (130, 1170)
    assert (taught.train_examples, taught.left_out_examples) == (1300, 0)
    assert [plan_steps(job, data) for data in (alone, taught)] == [8, 81]
    assert planned("data={kind: digits, global_batch: 64, labels: 0.1}").data.train_examples == 144


@pytest.mark.parametrize(
    ("overrides", "key", "said"),
    [
        (["data.global_batch=1438"], "data.global_batch", "larger than the training split of 1437; use at most 1437"),
        (["data.global_batch=1500", "parallel.workers=4"], "data.global_batch", "use at most 1436"),
        (["budget={epochs: 1e300}"], "budget.epochs", "more than any run can take"),
        (["budget={epochs: 1}", "optimizer.schedule.warmup_steps=22"], "optimizer.schedule.warmup_steps", "at most 21"),
        (["model.num_classes=9"], "model.num_classes", "less than the data's 10 classes"),
        (["parallel.device=cuda"], "parallel.device", "needs a GPU"),
        (["storage=abfs://bucket/runs"], "storage", "use s3://bucket/prefix, gs://bucket/prefix or a folder"),
        (["storage=/dev/null/runs"], "storage", "is a file"),
        (["storage=" + "x" * 3000], "storage", "cannot be used"),
        (["tracking.uri=mlruns"], "tracking.uri", "use e.g. sqlite:///mlruns.db"),
        (["tracking.uri=ftp://host"], "tracking.uri", "has the scheme ftp"),
        (["tracking.uri=sqlit:///a.db"], "tracking.uri", "did you mean 'sqlite'?"),
        (["tracking.uri='http://'"], "tracking.uri", "names no host"),
        (["model={kind: python, target: no_such_module:build}"], "model.target", "names the module no_such_module"),
        (["model={kind: gpt}"], "model.kind", "takes token ids, and data of kind digits are images"),
        (
            [
                "model={kind: mlp}",
                "data={kind: synthetic, shape: [8], global_batch: 8}",
                "parallel={tensor: 4, split: {fc: image_blocks}}",
            ],
            "parallel.split.fc",
            "needs images (channels, height, width), and an example has the shape [8]",
        ),
        (
            ["data.omit_classes=[2, 10]"],
            "data.omit_classes",
            "names a class that is none of the 10; use some of 0 to 9",
        ),
        (["data.omit_classes=[0, 1, 2, 3, 4, 5, 6, 7, 8, 9]"], "data.omit_classes", "leaves no class to train on"),
        ([ROWS, "data.omit_classes=[1]", "model.num_classes=3"], "data.omit_classes", "data.num_classes is not given"),
        (["data.labels=0"], "data.labels", "leaves nothing to train on"),
        (
            ["data.labels=1e-4"],
            "data.labels",
            "less than half of one of the 1437 training examples; use at least 0.0007",
        ),
        (["data.labels=0.01"], "data.global_batch", "larger than the training split of 14; use at most 14"),
        (["loss={kind: python, target: json:nothing}"], "loss.target", "does not define; it has dump, dumps"),
    ],
)
def test_what_the_facts_forbid_is_refused(storage, overrides, key, said):
    assert said in refused(*overrides)[key]


def test_problems_of_all_sources_come_together(storage):
    found = refused(
        "parallel={workers: 16, offload: cpu}",
        "storage=gs://",
        "tracking.uri=x",
        "data.holdout=9999",
        "budget.epochs=1",
    )
    assert set(found) == {
        "parallel.workers",
        "parallel.offload",
        "storage",
        "tracking.uri",
        "data.holdout",
        "budget.epochs",
    }


def test_the_tracking_address_of_the_environment_is_checked_too(storage, monkeypatch):
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "gopher://host")
    assert "from MLFLOW_TRACKING_URI" in refused()["tracking.uri"]
    assert planned("tracking.uri=http://localhost:5000").job.tracking.uri == "http://localhost:5000"


@pytest.mark.parametrize(
    ("facts", "said"),
    [
        (replace(FACTS, output_shape=(64, 8)), "gives 8 outputs per example, and the data has 10 classes"),
        (replace(FACTS, num_trainable=0, parameter_sizes=()), "has no trainable parameter"),
    ],
)
def test_a_model_that_cannot_learn_the_data_is_refused(storage, monkeypatch, facts, said):
    monkeypatch.setattr(probe, "_ask", lambda *_: json.loads(json.dumps(asdict(facts))))
    assert said in refused()["model"]


# ------------------------------------------------------------------------------------------------------ fingerprints


@pytest.mark.parametrize(
    "override",
    [
        "seed=1",
        "model.hidden=64",
        "data.global_batch=32",
        "data.holdout=100",
        "data.augment=[{kind: random_erasing}]",
        "data.labels=0.5",
        "data.omit_classes=[3]",
        "data.normalize={mean: [0.5], std: [0.5]}",
        "loss={kind: cross_entropy, label_smoothing: 0.1}",
        "optimizer.lr=0.2",
        "optimizer.schedule.warmup_steps=5",
        "precision.dtype=bf16",
        "precision.dtype=fp16",
        "parallel.zero=1",
        "parallel.workers=2",
        "parallel.micro_batch=32",
        "parallel={zero: 1, offload: cpu}",
        "parallel.cpus_per_worker=2",
        "budget.steps=101",
        "parallel.mode=parameter_server",
    ],
)
def test_what_decides_the_weights_changes_the_fingerprint(storage, override):
    assert planned(override).fingerprint != planned().fingerprint


@pytest.mark.parametrize(
    "override",
    [
        "name=other",
        "storage=elsewhere",
        "budget.evaluate_every=10",
        "budget.checkpoint_every=10",
        "budget.keep_checkpoints=5",
        "evaluation.metrics=[f1]",
        "evaluation.batch=7",
        "tracking.experiment=other",
        "parallel.max_restarts=0",
        "data.loader_processes=2",
        "model.num_classes=10",
        "parallel.micro_batch=64",
        "parallel.device=cpu",
        "loss={kind: cross_entropy}",
    ],
)
def test_what_no_weight_depends_on_does_not(storage, override):
    assert planned(override).fingerprint == planned().fingerprint


@pytest.mark.parametrize(
    ("job", "change"),
    [
        ("precision.dtype=fp16", "precision.scale_window=10"),
        ("precision.dtype=fp16", "precision.at_min_scale=hold"),
        ("precision.dtype=bf16", "precision.master_weights=false"),
        ("precision.dtype=bf16", "precision.fp32_accumulation=false"),
        ("parallel.mode=parameter_server", "parallel.shards=2"),
        ("parallel.mode=parameter_server", "parallel.n_fetch=2"),
        ("parallel.mode=parameter_server", "parallel.n_push=2"),
        ("parallel.mode=parameter_server", "parallel.max_staleness=0"),
        ("parallel.mode=parameter_server", "parallel.warm_start_steps=5"),
    ],
)
def test_what_acts_in_one_mode_only_changes_its_fingerprints(storage, job, change):
    assert planned(job, change).fingerprint != planned(job).fingerprint


def test_counting_flushed_gradients_changes_no_weight(storage):
    fp16 = "precision.dtype=fp16"
    assert planned(fp16, "precision.underflow_every=5").fingerprint == planned(fp16).fingerprint


def test_the_splits_are_in_the_fingerprint_and_not_the_patterns(storage, monkeypatch):
    prints = []
    for splits, patterns in ((SPLITS, "{}"), (SPLITS, "{fc: input_activations}"), ({"fc": "input_activations"}, "{}")):
        facts = replace(SPLIT_FACTS, splits=splits)
        monkeypatch.setattr(probe, "_ask", lambda *_, facts=facts: asdict(facts))
        prints.append(planned(f"parallel={{tensor: 2, split: {patterns}}}", f"storage=runs{len(prints)}").fingerprint)
    assert prints[0] == prints[1] != prints[2]


def test_a_fingerprint_is_over_the_one_before_and_canonical_json():
    assert fingerprint({"a": 1, "b": [2]}) == fingerprint({"b": [2], "a": 1})
    assert fingerprint({"a": 1}, before="x") != fingerprint({"a": 1})
    assert fingerprint({"a": 1}) == hashlib.sha256(b'["",{"a":1}]').hexdigest()


def test_ingredients_can_be_printed_and_compared(storage):
    job = job_of()
    data = data_facts(job.data, Path.cwd())
    recipe = ingredients(job, data, MeshPlan(1, 1, "cpu"), BatchPlan(64, 64, 64, 1), 100, {})
    assert json.loads(json.dumps(recipe)) == recipe
    assert recipe["topology"]["micro_batch"] == 64
    assert recipe["precision"] == {"dtype": "fp32"}
    keys = {"data", "pipeline", "zero", "offload", "micro_batch", "device", "threads"}
    assert recipe["topology"].keys() == keys, "what does not act is left out"
    assert recipe["data"].keys() == {"fingerprint", "holdout", "augment", "mean", "std", "global_batch"}
    assert recipe["model"]["num_classes"] == 10
    assert recipe["libraries"]["torch"].startswith("2.")
    assert fingerprint(recipe) == planned().fingerprint


# ----------------------------------------------------------------------------------------------------------- targets


def test_targets_are_found_and_hashed_without_being_imported(tmp_path, monkeypatch):
    folder = tmp_path / "job"
    folder.mkdir()
    monkeypatch.chdir(tmp_path)
    (folder / "nets_of_test.py").write_text("import parts_of_test\nraise SystemExit('imported')\ndef build(): ...\n")
    (tmp_path / "parts_of_test.py").write_text("width = 1\n")
    job = job_of(model={"kind": "python", "target": "nets_of_test:build"})
    assert check_targets(job, folder) == []
    assert find_module("nets_of_test", folder) == folder / "nets_of_test.py"
    before = hash_module("nets_of_test", folder)
    assert hash_module("nets_of_test", folder) == before
    (tmp_path / "parts_of_test.py").write_text("width = 2\n")
    assert hash_module("nets_of_test", folder) != before, "a local module that the target imports counts"
    assert "nets_of_test" not in sys.modules


def test_a_package_is_hashed_whole_and_stays_the_same_elsewhere(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    hashes = []
    for name in ("one", "two"):
        package = tmp_path / name / "package_of_test"
        package.mkdir(parents=True)
        (package / "__init__.py").write_text("")
        (package / "nets.py").write_text("from .layers import make as build\n")
        (package / "layers.py").write_text("def make(): ...\n")
        assert (
            check_targets(job_of(model={"kind": "python", "target": "package_of_test.nets:build"}), tmp_path / name)
            == []
        )
        hashes.append(hash_module("package_of_test.nets", tmp_path / name))
    assert hashes[0] == hashes[1]
    (tmp_path / "two" / "package_of_test" / "layers.py").write_text("def make(): return 1\n")
    assert hash_module("package_of_test.nets", tmp_path / "two") != hashes[0]


def test_a_target_that_is_not_python_is_a_problem(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "broken_of_test.py").write_text("def build(:\n")
    (problem,) = check_targets(job_of(model={"kind": "python", "target": "broken_of_test:build"}), tmp_path)
    assert problem.key == "model.target"
    assert "not valid Python" in problem.rule


# ------------------------------------------------------------------------------------------------------------- probe


def test_the_model_is_asked_once_and_again_when_it_changes(storage, monkeypatch):
    asked = []
    monkeypatch.setattr(
        probe, "_ask", lambda question, *_: asked.append(question) or json.loads(json.dumps(asdict(FACTS)))
    )
    assert planned().model == FACTS
    assert planned("optimizer.lr=1", "seed=3").model == FACTS
    assert len(asked) == 1
    planned("model.hidden=64")
    assert len(asked) == 2
    next((storage / "cache" / "models").iterdir()).write_text("{")
    planned()
    planned("model.hidden=64")
    assert len(asked) == 3, "a damaged answer is asked for again"


def test_a_broken_job_never_builds_its_model(storage, monkeypatch):
    monkeypatch.setattr(probe, "_ask", lambda *_: pytest.fail("the model was built"))
    refused("data.global_batch=9999")


def test_problems_of_the_model_reach_the_user(storage, monkeypatch):
    def ask(*_):
        raise JobError([Problem("model", "cnn", "cannot be built")])

    monkeypatch.setattr(probe, "_ask", ask)
    assert refused() == {"model": "model: cnn cannot be built"}


def test_the_probe_measures_a_real_model(tmp_path, monkeypatch):
    """An MLP 64 → 32 → 10 by hand: saved are the input, the ReLU's output (once for ReLU and product), nothing else."""
    monkeypatch.chdir(tmp_path)
    job = job_of(f"storage={tmp_path}/runs", model={"kind": "mlp", "hidden": [32]})
    facts = model_facts(job, data_facts(job.data, tmp_path), tmp_path)
    assert facts.parameter_sizes == (64 * 32, 32, 32 * 10, 10)
    assert facts.num_parameters == facts.num_trainable == sum(facts.parameter_sizes)
    assert facts.forward_flops_per_example == 2 * (64 * 32 + 32 * 10)
    assert facts.activation_bytes_per_example == 4 * (64 + 32)
    assert facts.output_shape == (10,)
    assert facts.buffer_bytes == 0
    assert [(output.name, output.kind, output.shape) for output in facts.outputs] == [
        ("0", "Flatten", (64,)),
        ("1", "Linear", (32,)),
        ("2", "ReLU", (32,)),
        ("3", "Linear", (10,)),
    ]
    assert model_facts(job, data_facts(job.data, tmp_path), tmp_path) == facts, "as read from the cache"


def test_a_model_of_ones_own_that_fails_is_a_problem_with_its_place(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "own_of_test.py").write_text(
        "from torch import nn\n\nprint('noise')\n\n"
        "def build():\n    return nn.Sequential(nn.Flatten(), nn.Linear(3, 10))\n"
    )
    job = job_of(f"storage={tmp_path}/runs", model={"kind": "python", "target": "own_of_test:build"})
    with pytest.raises(JobError) as caught:
        model_facts(job, data_facts(job.data, tmp_path), tmp_path)
    (problem,) = caught.value.problems
    assert problem.key == "model"
    assert "does not take an input of the shape (2, 1, 8, 8)" in problem.rule
    assert not (tmp_path / "runs").exists(), "a failure is not kept"


# ------------------------------------------------------------------------------------------------- DeepSpeed, memory


def configured(*overrides, device="cpu", data=2):
    job = job_of(*overrides)
    return deepspeed_config(job, plan_batch(64, data, job.parallel.micro_batch), MeshPlan(data, 1, device), 1000)


def test_deepspeed_is_told_the_batches_and_no_schedule():
    config = configured("parallel.micro_batch=16", "optimizer.clip_norm=1.5")
    assert (config["train_batch_size"], config["train_micro_batch_size_per_gpu"]) == (64, 16)
    assert config["gradient_accumulation_steps"] == 2
    assert config["gradient_clipping"] == 1.5
    assert "optimizer" not in config
    assert "scheduler" not in config
    assert config["zero_optimization"] == {"stage": 0}
    assert "fp16" not in config
    assert "bf16" not in config


@pytest.mark.parametrize("stage", [1, 2, 3])
def test_deepspeed_shards_and_offloads(stage):
    zero = configured(f"parallel={{zero: {stage}, offload: cpu}}", device="cuda")["zero_optimization"]
    assert zero["stage"] == stage
    assert zero["overlap_comm"] is True
    assert zero["offload_optimizer"] == {"device": "cpu", "pin_memory": True}
    on_cpu = configured(f"parallel.zero={stage}")["zero_optimization"]
    assert on_cpu["overlap_comm"] is False
    assert "offload_optimizer" not in on_cpu
    assert on_cpu["reduce_bucket_size"] == 1000


def test_deepspeed_scales_the_loss():
    dynamic = configured("precision={dtype: fp16, initial_scale: 1024, scale_window: 50, hysteresis: 1, min_scale: 2}")[
        "fp16"
    ]
    assert dynamic == {
        "enabled": True,
        "loss_scale": 0,
        "initial_scale_power": 10,
        "loss_scale_window": 50,
        "hysteresis": 1,
        "min_loss_scale": 2,
    }
    assert configured("precision={dtype: fp16, loss_scale: 128}")["fp16"] == {"enabled": True, "loss_scale": 128.0}
    assert configured("precision.dtype=bf16")["bf16"] == {"enabled": True}


ADAM = "optimizer={kind: adam, lr: 0.1}"
SGD = "optimizer={kind: sgd, lr: 0.1}"


@pytest.mark.parametrize(
    ("overrides", "parameters", "gradients", "state"),
    [
        # By ranks, in bytes a parameter: weights, gradients, masters and moments. Two ranks, 1000 parameters.
        ([ADAM], 4000, 4000, 8000),
        ([SGD], 4000, 4000, 0),
        (["optimizer={kind: adagrad, lr: 0.1}"], 4000, 4000, 4000),
        # DeepSpeed's own stage 0 is not used in half precision; stage 1 computes the same.
        ([ADAM, "precision.dtype=fp16"], 2000, 2000, 6000),
        ([ADAM, "parallel.zero=1"], 4000, 4000, 6000),
        ([ADAM, "parallel.zero=1", "precision.dtype=bf16"], 2000, 2000, 6000),
        # Rank 1 holds 500…1000, which the first parameter's end, the second and the third reach into.
        ([ADAM, "parallel.zero=2"], 4000, 4000, 6000),
        ([SGD, "parallel.zero=2", "precision.dtype=fp16"], 2000, 2000, 2000),
        # All three parameters are small, and so stage 3 keeps them whole beside their partitions.
        ([ADAM, "parallel.zero=3"], 6000, 2000, 6000),
        ([SGD, "parallel.zero=3", "precision.dtype=fp16"], 3000, 1000, 2000),
    ],
)
def test_memory_follows_the_zero_stage_precision_and_optimizer(overrides, parameters, gradients, state):
    memory = plan_memory(job_of(*overrides), FACTS, MeshPlan(2, 1, "cpu"), plan_batch(64, 2))
    assert (memory.parameters - FACTS.buffer_bytes, memory.gradients, memory.optimizer_state) == (
        parameters,
        gradients,
        state,
    )
    assert memory.host_bytes == 0


def test_stage_2_keeps_half_the_gradients_where_parameters_are_many():
    facts = replace(FACTS, parameter_sizes=(100,) * 10)
    memory = plan_memory(job_of("parallel.zero=2"), facts, MeshPlan(2, 1, "cpu"), plan_batch(64, 2))
    assert memory.gradients == 2000
    uneven = replace(FACTS, parameter_sizes=(150, 400, 150, 300))
    memory = plan_memory(job_of("parallel.zero=2"), uneven, MeshPlan(2, 1, "cpu"), plan_batch(64, 2))
    assert memory.gradients == 4 * 850, "rank 1 keeps the whole of the parameter that the cut goes through"


def test_large_parameters_are_cut_by_stage_3():
    facts = replace(FACTS, num_parameters=400_001, num_trainable=400_001, parameter_sizes=(300_000, 100_001))
    memory = plan_memory(job_of("parallel.zero=3"), facts, MeshPlan(2, 1, "cpu"), plan_batch(64, 2))
    assert memory.parameters == 4 * (150_000 + 50_001) + FACTS.buffer_bytes


@pytest.mark.parametrize(
    ("zero", "ranks", "bytes_of"),
    [
        (0, 1, lambda count, _: 16 * count),
        (1, 4, lambda count, ranks: 4 * count + 12 * count / ranks),
        (2, 4, lambda count, ranks: 2 * count + 14 * count / ranks),
        (3, 4, lambda count, ranks: 16 * count / ranks),
        # In a mesh Ψ is the rank's part of the model.
        (1, 2, lambda count, ranks: 4 * count + 12 * count / ranks),
    ],
)
def test_memory_of_fp16_and_adam_is_that_of_the_zero_paper(zero, ranks, bytes_of):
    """Rajbhandari et al. (2020), section 3, for parameters that divide evenly and that stage 3 cuts."""
    sizes, count = (200_000,) * 8, 1_600_000
    facts = replace(FACTS, num_parameters=count, num_trainable=count, parameter_sizes=sizes, buffer_bytes=0)
    job = job_of(ADAM, "precision.dtype=fp16", f"parallel.zero={zero}")
    memory = plan_memory(job, facts, MeshPlan(ranks, 1, "cpu"), plan_batch(64, ranks))
    assert memory.parameters + memory.gradients + memory.optimizer_state == bytes_of(count, ranks)


@pytest.mark.parametrize("stage", [1, 2, 3])
def test_offload_moves_masters_and_moments_to_the_host(stage):
    mesh_plan, batch = MeshPlan(2, 1, "cuda"), plan_batch(64, 2)
    at_home = plan_memory(job_of(ADAM, f"parallel.zero={stage}"), FACTS, mesh_plan, batch)
    away = plan_memory(job_of(ADAM, f"parallel={{zero: {stage}, offload: cpu}}"), FACTS, mesh_plan, batch)
    assert away.optimizer_state == 0
    assert away.host_optimizer_state == at_home.optimizer_state
    assert away.host_gradients >= 4 * 500
    assert away.device_bytes < at_home.device_bytes


def test_activations_grow_with_the_micro_batch_and_shrink_with_the_precision():
    for precision, expected in (("fp32", 64 * 16), ("fp16", 32 * 16)):
        job = job_of(f"precision.dtype={precision}")
        assert plan_memory(job, FACTS, MeshPlan(2, 1, "cpu"), BatchPlan(64, 32, 16, 2)).activations == expected


# ----------------------------------------------------------------------------------------------------------- imports


def test_planning_imports_neither_torch_nor_ray(tmp_path):
    """The first plan builds the model in another process; the second one reads what was kept."""
    (tmp_path / "job.yaml").write_text(json.dumps(BASE))
    code = (
        "import sys\n"
        "from temper.config.load import load_job\n"
        "from temper.plan.build import build_plan\n"
        "from temper.plan.mesh import local_cluster\n"
        "from temper.plan.show import plan_table\n"
        "from pathlib import Path\n"
        "plan_table(build_plan(load_job('job.yaml'), local_cluster(), Path('.')))\n"
        "heavy = {'torch', 'ray', 'deepspeed', 'mlflow', 'torchvision', 'pandas', 'sklearn', 'pyarrow', 'PIL'}\n"
        "print(sorted(heavy & set(sys.modules)))\n"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, capture_output=True, text=True, check=False)
    assert done.stdout.strip() == "[]", done.stderr
