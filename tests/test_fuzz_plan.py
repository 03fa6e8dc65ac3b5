"""Thousands of broken jobs against `temper plan`: each is refused with exit code 2 and its key, and no traceback."""

import copy
import json
import math
import random
import string
from dataclasses import asdict
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from temper import cli
from temper.config.load import load_job
from temper.config.text import format_yaml
from temper.errors import EXIT_DONE, EXIT_WRONG_JOB
from temper.plan import probe
from temper.plan.build import build_plan
from temper.plan.mesh import ClusterShape
from temper.plan.probe import ModelFacts, PrunableWeight

JOBS = (
    {
        "name": "first",
        "model": {"kind": "resnet", "depth": 20, "width": 1.0},
        "data": {
            "kind": "cifar10",
            "global_batch": 128,
            "holdout": 5000,
            "augment": [{"kind": "random_crop", "padding": 4}, {"kind": "random_horizontal_flip", "p": 0.5}],
            "normalize": {"mean": [0.5, 0.5, 0.5], "std": [0.25, 0.25, 0.25]},
        },
        "optimizer": {
            "kind": "sgd",
            "lr": 0.1,
            "momentum": 0.9,
            "nesterov": True,
            "clip_norm": 1.0,
            "schedule": {"kind": "step", "warmup_steps": 10, "milestones": [0.5, 0.75], "gamma": 0.1},
        },
        "precision": {"dtype": "fp16", "loss_scale": "dynamic", "initial_scale": 1024.0, "scale_window": 100},
        "parallel": {"workers": 2, "zero": 2, "micro_batch": 32, "device": "auto", "max_restarts": 1},
        "budget": {"steps": 1000, "evaluate_every": 100, "checkpoint_every": 200},
        "evaluation": {"metrics": ["accuracy", "f1"], "batch": 256},
        "tracking": {"experiment": "fuzz", "system_metrics": False},
        "seed": 3,
    },
    {
        "name": "second",
        "model": {"kind": "mlp", "hidden": [64, 32], "dropout": 0.1},
        "data": {"kind": "synthetic", "global_batch": 16, "shape": [3, 8, 8], "num_classes": 5, "train_examples": 100},
        "loss": {"kind": "cross_entropy", "label_smoothing": 0.1},
        "optimizer": {"kind": "adamw", "lr": 0.001, "betas": [0.9, 0.99], "weight_decay": 0.01},
        "budget": {"epochs": 2.5},
        "dsd": {
            "rounds": [
                {"sparsity": 0.3, "sparse_epochs": 1.5, "redense_steps": 9, "redense_lr_factor": 0.5},
                {"structure": "2:4", "criterion": "random", "sparse_steps": 8, "redense_steps": 7},
            ],
            "sparse_lr_factor": 0.5,
            "schedule": {"kind": "linear", "warmup_steps": 2, "final_factor": 0.1},
            "optimizer_state": "kept",
            "exclude_first_conv": False,
        },
    },
)
REQUIRED = (
    "name",
    "model",
    "data",
    "optimizer",
    "budget",
    "model.kind",
    "data.kind",
    "data.global_batch",
    "optimizer.lr",
)
# No field of a job takes any of these, whatever its type; text is wrong in all fields but those of TEXT.
NEVER = [{"x": 1}, [[1]], -1, -0.5, 10**50, math.nan, math.inf, -math.inf, True, [{}], {"kind": None}]
TEXT = {"name", "storage", "tracking.experiment", "tracking.uri"}
FLAGS = {"optimizer.nesterov", "tracking.system_metrics", "dsd.exclude_first_conv"}
CLUSTER = ClusterShape(nodes=1, cpus=8.0, gpus=0.0)
FACTS = ModelFacts(
    1000, 1000, (600, 400), 0, 64, 2000, None, prunable=(PrunableWeight("fc.weight", (20, 20), "linear"),)
)


def fuzz(examples):
    """The same examples in every run, however slow the machine."""
    checks = [HealthCheck.function_scoped_fixture, HealthCheck.too_slow, HealthCheck.filter_too_much]
    return settings(max_examples=examples, derandomize=True, deadline=None, database=None, suppress_health_check=checks)


def paths_in(value, above=()):
    """The path of every value inside a job, sections and lists as well."""
    items = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    for key, child in items:
        yield (*above, key)
        yield from paths_in(child, (*above, key))


# A mean may be any number; it is broken as a whole, and not by its entries.
PATHS = [(index, path) for index, job in enumerate(JOBS) for path in paths_in(job) if "mean" not in path[:-1]]
KEYS = [(index, path) for index, path in PATHS if isinstance(path[-1], str)]


def dotted(path):
    return ".".join(map(str, path))


def holder_of(job, path):
    for key in path[:-1]:
        job = job[key]
    return job


@pytest.fixture(autouse=True)
def nothing_is_built(tmp_path, monkeypatch):
    """A model must not be built for a broken job; a right one gets an answer that was prepared."""
    monkeypatch.setattr(probe, "_ask", lambda *_: asdict(FACTS))
    monkeypatch.setattr(cli, "local_cluster", lambda: CLUSTER, raising=False)
    monkeypatch.setattr("temper.plan.mesh.local_cluster", lambda: CLUSTER)
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    monkeypatch.chdir(tmp_path)


def plan_text(text, overrides=()):
    """Exit code and standard error of `temper plan` on a file of this content."""
    Path("job.yaml").write_bytes(text if isinstance(text, bytes) else text.encode("utf-8", "surrogatepass"))
    return plan_file("job.yaml", overrides)


def plan_file(name, overrides=()):
    said = []
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(cli, "_say", said.append)
        code = cli.main(["plan", "--", name, *overrides])
    return code, "\n".join(said)


def assert_refused(text, key, overrides=()):
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(probe, "_ask", lambda *_: pytest.fail("a model was built for a broken job"))
        code, said = plan_text(text, overrides)
    assert code == EXIT_WRONG_JOB
    keys = [line.strip().split(": ")[0].rstrip(":") for line in said.splitlines()[1:]]
    assert any(found == key or found.startswith(f"{key}.") for found in keys), f"{key} is not named in:\n{said}"
    assert "Traceback" not in said


@pytest.mark.parametrize("job", JOBS, ids=lambda job: job["name"])
def test_the_jobs_are_right_before_they_are_broken(job):
    code, said = plan_text(format_yaml(job))
    assert code == EXIT_DONE, said


@pytest.mark.parametrize("key", REQUIRED)
@pytest.mark.parametrize("job", JOBS, ids=lambda job: job["name"])
def test_a_deleted_key_is_named(job, key):
    broken = copy.deepcopy(job)
    path = key.split(".")
    del holder_of(broken, path)[path[-1]]
    assert_refused(format_yaml(broken), key)


@fuzz(500)
@given(place=st.sampled_from(KEYS), new=st.text(string.ascii_letters + "éß漢_- 0", min_size=1, max_size=12))
def test_a_renamed_key_is_named(place, new):
    index, path = place
    broken = copy.deepcopy(JOBS[index])
    holder = holder_of(broken, path)
    new = f"{new}{path[-1]}x"
    holder[new] = holder.pop(path[-1])
    # Without its kind a section has no keys that could be right or wrong.
    is_kind = path[-1] == "kind" and "schedule" not in path
    assert_refused(format_yaml(broken), dotted(path) if is_kind else dotted((*path[:-1], new)).strip())


@fuzz(900)
@given(place=st.sampled_from(PATHS), value=st.sampled_from(NEVER) | st.text(min_size=1, max_size=20))
def test_a_wrong_value_is_named(place, value):
    index, path = place
    broken = copy.deepcopy(JOBS[index])
    key = dotted(path)
    if isinstance(value, str) and (key in TEXT or value in ("dynamic", "auto")):
        value = ["x"]
    if value is True and key in FLAGS:  # the one value of NEVER that a flag takes
        value = "true and false"
    holder_of(broken, path)[path[-1]] = value
    assert_refused(format_yaml(broken), key)


@fuzz(300)
@given(place=st.sampled_from(PATHS), value=st.sampled_from([item for item in NEVER if item is not True]))
def test_a_wrong_override_is_named(place, value):
    index, path = place
    text = json.dumps(value).replace("NaN", ".nan").replace("Infinity", ".inf")
    assert_refused(format_yaml(JOBS[index]), dotted(path), [f"{dotted(path)}={text}"])


@fuzz(300)
@given(override=st.text(max_size=30) | st.from_regex(r"[a-z.]{1,12}=[\[\]{}:,'\"&*!|>%@` \w]{0,12}", fullmatch=True))
def test_any_override_is_applied_or_refused(override):
    code, said = plan_text(format_yaml(JOBS[1]), [override])
    assert code in (EXIT_DONE, EXIT_WRONG_JOB)
    assert "Traceback" not in said
    if code == EXIT_WRONG_JOB:
        assert said.strip()


@fuzz(700)
@given(seed=st.integers(0, 2**32), edits=st.integers(1, 6))
def test_any_damage_to_the_text_is_refused_or_harmless(seed, edits):
    draw = random.Random(seed)
    text = format_yaml(JOBS[seed % len(JOBS)])
    for _ in range(edits):
        at = draw.randrange(len(text) + 1)
        cut = draw.choice([0, 0, 1, 1, 2, 5, 50])
        text = (
            text[:at]
            + draw.choice(["", "", *"\t\n:,[]{}&*!|>'\"%@`#-?~\0 \x07\u2028\ufeff", "- ", ": ", "<<: *a"])
            + text[at + cut :]
        )
    code, said = plan_text(text)
    assert code in (EXIT_DONE, EXIT_WRONG_JOB)
    assert "Traceback" not in said


JUNK = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=10),
    lambda inner: (
        st.lists(inner, max_size=4)
        | st.dictionaries(st.sampled_from(sorted({*JOBS[0], "kind", "x"})), inner, max_size=6)
    ),
    max_leaves=20,
)


@fuzz(300)
@given(junk=JUNK)
def test_any_other_document_is_refused(junk):
    code, said = plan_text(json.dumps(junk))
    assert code == EXIT_WRONG_JOB
    assert said.strip()


@fuzz(200)
@given(content=st.binary(max_size=200))
def test_any_other_file_is_refused(content):
    code, _ = plan_text(content)
    assert code == EXIT_WRONG_JOB


def test_what_was_fuzzed_is_what_the_api_does(tmp_path):
    Path("job.yaml").write_text(format_yaml(JOBS[0]))
    assert build_plan(load_job("job.yaml"), CLUSTER, tmp_path).steps == 1000
