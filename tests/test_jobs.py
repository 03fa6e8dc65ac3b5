"""Every shipped job loads, plans and trains: the list is the folder's, so that a new file needs no line here.

`make test` plans and trains the smallest, and one that goes through all that a job can; `make test-all` the others.
"""

from __future__ import annotations

import json
import math
import os
import subprocess
import sys
from pathlib import Path

import pytest

from temper.config.load import job_to_yaml, load_job
from temper.config.schema import JobConfig
from temper.data.download import check_files
from temper.launch.teachers import plan_job
from temper.plan.facts import data_facts
from temper.plan.mesh import ClusterShape, local_cluster
from temper.plan.metric_names import without_classes

ROOT = Path(__file__).parent.parent
FOLDER = ROOT / "jobs"
JOBS = sorted(FOLDER.rglob("*.yaml"))
STEPS = 3
CACHED_EXAMPLES = 500

# fashion_student_dsd trains its teacher, asks it and goes through all phases.
QUICK = {"digits", "fashion_student_dsd"}
assert {path.stem for path in JOBS} > QUICK

every_job = pytest.mark.parametrize("path", JOBS, ids=lambda path: path.stem)
each_kind = pytest.mark.parametrize(
    "path",
    [pytest.param(path, marks=() if path.stem in QUICK else pytest.mark.slow) for path in JOBS],
    ids=lambda path: path.stem,
)


@pytest.fixture(autouse=True)
def place(monkeypatch: pytest.MonkeyPatch) -> None:
    """Where the README's commands are typed, with the real data beside the repository where there are some."""
    monkeypatch.chdir(ROOT)
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    beside = ROOT.parent / "shared" / "data"
    if "TEMPER_DATA" not in os.environ and beside.is_dir():
        monkeypatch.setenv("TEMPER_DATA", str(beside))


def needs_data(job: JobConfig) -> None:
    """Skips where the job's data set would have to be fetched, or a folder of the user's is not there."""
    folder = getattr(job.data, "path", None)
    if check_files(job.data.kind) or (folder is not None and not Path(folder).exists()):
        pytest.skip(f"the data of {job.data.kind} are not here")


def cluster_for(job: JobConfig) -> ClusterShape:
    """A cluster on which the job has room, and its teacher."""
    workers = max(job.parallel.workers * job.parallel.pipeline, 2 if job.distill is not None else 1)
    return ClusterShape(
        nodes=1,
        cpus=workers * job.parallel.cpus_per_worker,
        gpus=float(workers) if job.parallel.device == "cuda" else 0.0,
    )


def short_phases(job: JobConfig) -> list[str]:
    """Overrides that leave so few steps of each sparse and re-dense phase."""
    return [
        override
        for index, round_ in enumerate(job.dsd.rounds if job.dsd else ())
        for kind in (["sparse"] if round_.redense_steps == 0 else ["sparse", "redense"])
        for override in (f"dsd.rounds.{index}.{kind}_steps={STEPS}", f"dsd.rounds.{index}.{kind}_epochs=null")
    ]


def short_training(job: JobConfig) -> list[str]:
    """Overrides that leave so few steps of the dense phase, on as many cores as there are."""
    return [
        f"budget.steps={STEPS}",
        "budget.epochs=null",
        "budget.evaluate_every=0",
        "budget.checkpoint_every=0",
        "optimizer.schedule.warmup_steps=0",
        "parallel.warm_start_steps=0",
        f"parallel.cpus_per_worker={min(0.5, (os.cpu_count() or 1) / job.parallel.workers)}",
    ]


def short_teaching(path: Path, job: JobConfig, folder: Path) -> list[str]:
    """Overrides that name a teacher as short as its student in place of the job's, and hold out all but a few of the
    examples that it is asked about."""
    if job.distill is None:
        return []
    assert isinstance(job.distill.teacher, str), "the shipped jobs name a job"
    source = path.parent / job.distill.teacher
    file = folder / source.name
    file.write_text(job_to_yaml(load_job(source, short_training(load_job(source)))))
    overrides = [f"distill.teacher={file}"]
    if job.distill.cache != "none":
        training = job.data.holdout + data_facts(job.data, FOLDER, taught=True).train_examples
        overrides.append(f"data.holdout={training - CACHED_EXAMPLES}")
    return overrides


@every_job
def test_it_names_its_schema(path: Path) -> None:
    first, second, *_ = path.read_text().splitlines()
    assert first == f"# yaml-language-server: $schema={os.path.relpath(FOLDER / 'job.schema.json', path.parent)}"
    assert (FOLDER / "job.schema.json").is_file()
    assert second.startswith("# "), "say what the job is"


@every_job
def test_it_is_called_as_its_file(path: Path) -> None:
    assert load_job(path).name == path.stem


@each_kind
def test_it_plans(path: Path, tmp_path: Path) -> None:
    job = load_job(path, [f"storage={tmp_path}"])
    needs_data(job)
    plan = plan_job(job, cluster_for(job), path.parent)
    assert plan.steps > 0
    assert plan.model.num_parameters > 0
    assert plan.mesh.world_size == job.parallel.workers * job.parallel.pipeline
    assert plan.batch.micro_batch * plan.batch.accumulation * plan.mesh.data == job.data.global_batch


@pytest.mark.ray
@each_kind
def test_it_trains(path: Path, tmp_path: Path) -> None:
    """The job as it is, for a few steps of each phase; the whole test split is evaluated at their end."""
    job = load_job(path)
    needs_data(job)
    if job.parallel.device == "cuda" and not local_cluster().gpus:
        pytest.skip("needs a GPU")
    overrides = [
        *short_training(job),
        *short_phases(job),
        *short_teaching(path, job, tmp_path),
        f"storage={tmp_path / 'runs'}",
    ]
    command = [sys.executable, "-m", "temper", "train", str(path.relative_to(ROOT)), *overrides, "--json"]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    result = json.loads(done.stdout.splitlines()[-1])
    assert result["status"] == "finished"
    assert [phase["steps"] for phase in result["phases"]] == [STEPS] * (1 + len(short_phases(job)) // 2)
    tested = {name: value for name, value in result["metrics"].items() if name.startswith("test/")}
    agreement = {"test/teacher_agreement"} if job.distill is not None else set()
    expected = {"test/loss", *(f"test/{metric}" for metric in job.evaluation.metrics), *agreement}
    assert set(without_classes(tested)) == expected
    assert len(tested) == len(expected) + 10
    assert all(math.isfinite(value) for value in tested.values())
