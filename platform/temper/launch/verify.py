"""`temper verify`: the job's first steps in one process and in its topology, compared; the result is a certificate.

Both are traced first in fp32, whose rounding hides nothing, then in the job's own precision; of a job that prunes, the
first sparse phase is traced, too.
"""

from __future__ import annotations

import shutil
import time
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from temper.config.load import job_to_yaml
from temper.config.schema import JobConfig, ParallelConfig, PrecisionConfig
from temper.data.download import fetch_files
from temper.errors import JobError, Problem, RunError
from temper.files import read_lines, write_json
from temper.launch.cluster import RaySession, cluster_shape, prepare_environment
from temper.launch.ingest import ingest
from temper.launch.teachers import plan_job
from temper.launch.train import TrainOptions, import_folders, train_teachers
from temper.plan.build import Plan
from temper.plan.mesh import ClusterShape
from temper.plan.phases import PhasePlan
from temper.run_folder import FAILURES, TraceSpec, TraceTask
from temper.storage import absolute_storage
from temper.tracking.mlflow_store import close_run, log_certificate, open_run, tracking_uri
from temper.verify import Comparison, compare

CERTIFICATE = "verify.json"


@dataclass(frozen=True)
class Certificate:
    """What was compared and what came of it. `comparisons` are in fp32 and, if that is another, in the job's precision;
    in each of the dense phase and, if there is one, of the first that prunes.

    `difference` names the first layer and step that differ; None where the topology computes what one process does.
    """

    job: str
    fingerprint: str
    topology: dict[str, Any]
    one_process: dict[str, Any]
    steps: int
    comparisons: tuple[Comparison, ...]
    difference: str | None
    seconds: float
    run_id: str = ""

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)


def launch_verify(
    job: JobConfig, job_folder: Path, *, steps: int, address: str, command: str, say: Callable[[str], None]
) -> Certificate:
    """Verifies `job`; `say` is told what is being done, for people.

    Teachers that have not been trained are trained first. The certificate lies in `<run folder>/verify.json` and in an
    MLflow run of its own, `run_id`, which is empty where MLflow does not take it. Raises JobError where the job cannot
    be planned or has no equal in one process, and RunError where a step fails.
    """
    started = time.perf_counter()
    prepare_environment(address)
    job = _with_live_teacher(job.model_copy(update={"storage": absolute_storage(job.storage)}))
    _check_mode(job)
    with ExitStack() as stack:
        session = RaySession(address, stack)
        if not session.is_embedded:
            session.start(job.storage_folder / "logs")
        cluster = cluster_shape(address)
        plans = [plan_job(variant, cluster, job_folder) for variant in _precisions(job)]
        references = [_in_one_process(plan, cluster, job_folder) for plan in plans]
        train_teachers(plans[-1], TrainOptions(address, command=command), session, stack)
        if session.is_embedded:
            fetch_files(job.data.kind)
        if not session.is_started:
            say("starting Ray")
        session.start(plans[-1].run_folder / "logs")
        ingest(job.data, plans[-1].data, job.storage_folder, say)
        comparisons = _compare_all(plans, references, steps, job_folder, say, embedded=session.is_embedded)
    certificate = _certificate(plans[-1], references[-1], steps, comparisons, time.perf_counter() - started)
    return _keep(certificate, plans[-1], command, say)


def _check_mode(job: JobConfig) -> None:
    if job.parallel.mode == "parameter_server":
        rule = "has no equal in one process: what its workers compute depends on when they meet"
        raise JobError([Problem("parallel.mode", job.parallel.mode, rule, "verify it with mode: synchronous")])


def _with_live_teacher(job: JobConfig) -> JobConfig:
    """A few steps need no cache, and what it says is what the teacher says; but for `top_k`, which no mesh acts on."""
    if job.distill is None or job.distill.cache == "none":
        return job
    live = {"cache": "none", "top_k": None, "teacher_batch": None}
    return job.model_copy(update={"distill": job.distill.model_copy(update=live)})


def _precisions(job: JobConfig) -> list[JobConfig]:
    exact = job.model_copy(update={"precision": PrecisionConfig()})
    return [exact] if job.precision.dtype == "fp32" else [exact, job]


def _in_one_process(plan: Plan, cluster: ClusterShape, job_folder: Path) -> Plan:
    """The same job on one rank; micro-batches as large as those of all replicas together, so that batch norms see the
    same examples."""
    alone = ParallelConfig(
        micro_batch=plan.batch.micro_batch * plan.mesh.data,
        device=plan.job.parallel.device,
        cpus_per_worker=plan.job.parallel.cpus_per_worker,
    )
    update: dict[str, Any] = {"parallel": alone}
    if plan.job.distill is not None and plan.distill is not None:
        teaching = {"placement": "replicated", "teacher_batch": plan.distill.rows}
        update["distill"] = plan.job.distill.model_copy(update=teaching)
    return plan_job(plan.job.model_copy(update=update), cluster, job_folder)


def _compare_all(
    plans: Sequence[Plan],
    references: Sequence[Plan],
    steps: int,
    job_folder: Path,
    say: Callable[[str], None],
    *,
    embedded: bool,
) -> tuple[Comparison, ...]:
    root = plans[-1].run_folder
    traces = root / "verify"
    shutil.rmtree(traces, ignore_errors=True)
    (root / FAILURES).unlink(missing_ok=True)
    try:
        for name, side in (("one-process", references), ("topology", plans)):
            ranks = side[0].mesh.world_size
            say(f"taking {steps} steps on {ranks} rank{'s' if ranks > 1 else ''}")
            tasks = tuple(task for plan in side for task in _tasks(plan, traces / name))
            _trace(TraceSpec(root, tasks, steps, import_folders(job_folder)), embedded=embedded)
        say("comparing")
        alone, together = traces / "one-process", traces / "topology"
        compared = [(plan.job.precision.dtype, phase.name) for plan in plans for phase in _traced_phases(plan)]
        return tuple(
            compare(alone / dtype / phase, together / dtype / phase, dtype, phase) for dtype, phase in compared
        )
    finally:
        shutil.rmtree(traces, ignore_errors=True)


def _traced_phases(plan: Plan) -> list[PhasePlan]:
    """The dense phase, and the first that prunes."""
    sparse = [phase for phase in plan.phases if phase.pruning is not None and phase.pruning.layers]
    return [plan.phases[0], *sparse[:1]]


def _tasks(plan: Plan, folder: Path) -> list[TraceTask]:
    place = folder / plan.job.precision.dtype
    return [TraceTask(plan, phase, place / phase.name) for phase in _traced_phases(plan)]


def _trace(spec: TraceSpec, *, embedded: bool) -> None:
    from temper.launch.trainer import build_tracer

    try:
        build_tracer(spec, embedded=embedded).fit()
    except Exception as error:
        failures = read_lines(spec.run_folder / FAILURES)
        text = f"rank {failures[-1]['rank']}: {failures[-1]['message']}" if failures else str(error)
        raise RunError(f"{text}; the logs are {spec.run_folder / 'logs'}/verify-rank-*.log") from error


def _certificate(
    plan: Plan, reference: Plan, steps: int, comparisons: tuple[Comparison, ...], seconds: float
) -> Certificate:
    wrong = next((item for item in comparisons if item.difference is not None), None)
    return Certificate(
        job=plan.job.name,
        fingerprint=plan.fingerprint,
        topology=_topology(plan),
        one_process=_topology(reference),
        steps=steps,
        comparisons=comparisons,
        difference=None if wrong is None else f"{wrong.dtype}, {wrong.phase}, {wrong.difference}",
        seconds=seconds,
    )


def _topology(plan: Plan) -> dict[str, Any]:
    return {
        **asdict(plan.mesh),
        "world_size": plan.mesh.world_size,
        "zero": plan.job.parallel.zero,
        "offload": plan.job.parallel.offload,
        **asdict(plan.batch),
    }


def _keep(certificate: Certificate, plan: Plan, command: str, say: Callable[[str], None]) -> Certificate:
    """Writes the certificate where the run's files are, and into MLflow, if that takes it: a proof that took minutes is
    not lost with a store that is away."""
    uri, file, opened = tracking_uri(plan.job), plan.run_folder / CERTIFICATE, list[str]()
    is_equal = certificate.difference is None
    write_json(file, certificate.to_dict())
    try:
        run_id = open_run(
            uri,
            plan,
            job_yaml=job_to_yaml(plan.job),
            command=command,
            created=opened.append,
            name=f"{plan.job.name} verify",
            tags={"temper.kind": "verify"},
        )
        logged = replace(certificate, run_id=run_id)
        log_certificate(uri, run_id, logged.to_dict(), "equal" if is_equal else "differs")
    except RunError as error:
        logged = certificate
        say(f"MLflow lacks the certificate, which is {file}: {error}")
    for run_id in opened:
        close_run(uri, run_id, "FINISHED" if is_equal else "FAILED")
    write_json(file, logged.to_dict())
    return logged
