"""MLflow: where a run is recorded, opening and closing it, and its metrics as a sink of records.

This module and :mod:`registry` import mlflow, and only inside functions, because the import takes one to three seconds.
A fresh SQLite store costs three more (MLflow's own migrations), so the driver opens the run beside Ray's start-up.
"""

from __future__ import annotations

import contextlib
import getpass
import json
import logging
import os
import re
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import yaml

import temper
from temper.config.schema import JobConfig
from temper.errors import RunError
from temper.files import read_json
from temper.tracking.history import Record
from temper.tracking.provenance import GitState, environment_text, git_state
from temper.tracking.redact import redact_text, redact_values

if TYPE_CHECKING:
    from mlflow import MlflowClient
    from mlflow.entities import Metric, Run, RunTag

    from temper.plan.build import Plan

log = logging.getLogger(__name__)

RunStatus = Literal["FINISHED", "FAILED", "KILLED"]

PROGRESS_METRIC = "train/loss"
"""Every record has it, and it is sent last: its latest step in MLflow is the last record that arrived whole."""

LAST_NON_FINITE = "temper.last_non_finite"
"""The tag with the newest event of the run: where, and at which step, a value was not finite."""

BATCH_METRICS = 1000  # MLflow's limits on one request, and on the length of names and values
_BATCH_PARAMS = 100
_KEY_LENGTH = 250
_PARAM_LENGTH = 6000
_TAG_LENGTH = 5000
_SYSTEM_INTERVAL_S = 5.0

# Unless the user has set them. By default an unreachable server blocks a call for minutes; MLflow's asynchronous
# logging loses points; its usage reports have no place in a training job.
_ENVIRONMENT = {
    "MLFLOW_HTTP_REQUEST_MAX_RETRIES": "1",
    "MLFLOW_HTTP_REQUEST_BACKOFF_FACTOR": "1",
    "MLFLOW_HTTP_REQUEST_TIMEOUT": "10",
    "MLFLOW_LOGGING_LEVEL": "WARNING",
    "MLFLOW_DISABLE_TELEMETRY": "true",
    "MLFLOW_ENABLE_ARTIFACTS_PROGRESS_BAR": "false",
}


class RefusedError(Exception):
    """The store is up and will never take these metrics as they are."""


# ------------------------------------------------------------------------------------------------------- where


def tracking_uri(job: JobConfig) -> str:
    """`tracking.uri`, else the default of the job's storage."""
    return storage_uri(job.storage_folder, job.tracking.uri)


def storage_uri(storage: Path, configured: str | None = None) -> str:
    """`configured`, else MLFLOW_TRACKING_URI, else SQLite in `storage`. Relative paths are made absolute, because the
    process that writes the metrics has another working directory."""
    configured = configured or os.environ.get("MLFLOW_TRACKING_URI")
    if not configured:
        return f"sqlite:///{storage.absolute()}/mlflow.db"
    path = configured.removeprefix("sqlite:///")
    if path != configured:
        return f"sqlite:///{Path(path).absolute()}"
    is_path = "://" not in configured and configured != "databricks"
    return Path(configured).absolute().as_uri() if is_path else configured


def build_client(uri: str) -> MlflowClient:
    """A client of the store at `uri` that gives up on a dead server in seconds, not minutes."""
    for name, value in _ENVIRONMENT.items():
        os.environ.setdefault(name, value)
    from mlflow import MlflowClient

    with _alone(uri):
        _create_database(uri)
        return MlflowClient(tracking_uri=uri)


def _create_database(uri: str) -> None:
    """A SQLite file with MLflow's tables, whole or not there: it is made beside its place, because MLflow cannot open
    one whose making was broken off."""
    database = Path(uri.removeprefix("sqlite:///"))
    if not uri.startswith("sqlite:///") or "?" in uri or database.exists():
        return
    from mlflow import MlflowClient

    unfinished = database.with_name(f"{database.name}.new")
    for left_over in (unfinished, unfinished.with_name(f"{unfinished.name}-journal")):
        left_over.unlink(missing_ok=True)
    client = MlflowClient(tracking_uri=f"sqlite:///{unfinished}")
    client._tracking_client.store.engine.dispose()
    unfinished.replace(database)


@contextlib.contextmanager
def _alone(uri: str) -> Iterator[None]:
    """Hold the lock of a SQLite file: two processes that create its tables at once break each other (mlflow #4123)."""
    if not uri.startswith("sqlite:///"):
        yield
        return
    from filelock import FileLock

    database = Path(uri.removeprefix("sqlite:///"))
    database.parent.mkdir(parents=True, exist_ok=True)
    with FileLock(f"{database}.lock"):
        yield


# ----------------------------------------------------------------------------------------------- opening, closing


def known_run(record: Path, uri: str) -> str | None:
    """The run that a file says was opened in this store: `{"uri", "run_id", …}`."""
    known = read_json(record) or {}
    return known.get("run_id") if known.get("uri") == uri else None


def open_run(
    uri: str,
    plan: Plan,
    *,
    run_id: str | None = None,
    job_yaml: str,
    command: str,
    created: Callable[[str], None] = lambda run_id: None,
    name: str | None = None,
    tags: Mapping[str, str] | None = None,
) -> str:
    """Create the run of `plan`, or go on with run `run_id`; return the run's id. A new one has the job's name unless
    another is given, and the `tags`; `created` is called with its id before anything else is logged.

    Parameters, tags and artifacts are logged when the run is created; when it is continued, only what is missing. A run
    that was deleted meanwhile is replaced by a new one. Nothing that is logged holds a secret: see :mod:`redact`.
    Raises RunError where the store cannot be reached or used.
    """
    try:
        client = build_client(uri)
        run = _find_run(client, run_id) if run_id else None
        if run is None:
            run = _create_run(client, uri, plan, name or plan.job.name, tags or {})
            created(str(run.info.run_id))
        client.update_run(run.info.run_id, status="RUNNING")
        _log_description(client, run, plan, job_yaml=job_yaml, command=command)
    except Exception as error:  # which one depends on the store: MlflowException, sqlalchemy's, requests', OSError
        remedy = "start the server or set tracking.uri"
        if "schema" in str(error) and "upgrade" in str(error):
            remedy = "run `mlflow db upgrade` on it, after a backup"
        raise RunError(f"tracking.uri: {redact_text(uri)} cannot be used: {first_line(error)}; {remedy}") from error
    return str(run.info.run_id)


def log_tags(uri: str, run_id: str, tags: Mapping[str, str]) -> None:
    """Sets tags of a run. Raises RunError where the store does not take them."""
    from mlflow.entities import RunTag

    try:
        build_client(uri).log_batch(run_id, tags=[RunTag(*tag) for tag in tags.items()], synchronous=True)
    except Exception as error:  # as in open_run
        raise RunError(f"tracking.uri: {redact_text(uri)} does not take tags: {first_line(error)}") from error


def log_certificate(uri: str, run_id: str, certificate: Mapping[str, Any], verdict: str) -> None:
    """Puts the result of `temper verify` into a run: the artifact `verify.json` and the tag `temper.verify`.

    Raises RunError where the store does not take it.
    """
    try:
        client = build_client(uri)
        client.log_text(run_id, json.dumps(certificate, indent=2) + "\n", "verify.json")
        client.set_tag(run_id, "temper.verify", verdict)
        client.set_tag(run_id, "mlflow.runName", f"{certificate['job']} verify")
    except Exception as error:  # as in open_run
        what = f"tracking.uri: {redact_text(uri)} does not take the certificate"
        raise RunError(f"{what}: {first_line(error)}") from error


def log_texts(uri: str, run_id: str, texts: Mapping[str, str]) -> None:
    """Puts texts into a run, as artifacts with these paths. Raises RunError where the store does not take them."""
    try:
        client = build_client(uri)
        for path, text in texts.items():
            client.log_text(run_id, text, path)
    except Exception as error:  # as in open_run
        what = f"tracking.uri: {redact_text(uri)} does not take {', '.join(texts)}"
        raise RunError(f"{what}: {first_line(error)}") from error


def close_run(uri: str, run_id: str, status: RunStatus, timeout_s: float = 10.0) -> bool:
    """Give the run its terminal status; false, with a line in the log, where the store does not take it in time."""
    return _persist(lambda: build_client(uri).set_terminated(run_id, status), f"status {status}", timeout_s)


def _persist(action: Callable[[], object], what: str, timeout_s: float) -> bool:
    deadline = time.monotonic() + timeout_s
    while True:
        try:
            action()
            return True
        except Exception as error:
            if time.monotonic() >= deadline:
                log.warning("MLflow did not take the %s: %s", what, first_line(error))
                return False
        time.sleep(0.5)


def _find_run(client: MlflowClient, run_id: str) -> Run | None:
    from mlflow.exceptions import MlflowException

    try:
        run = client.get_run(run_id)
    except MlflowException as error:
        if error.error_code != "RESOURCE_DOES_NOT_EXIST":
            raise
        log.warning("run %s is not in this store any more; a new one takes its place", run_id)
        return None
    if run.info.lifecycle_stage == "deleted":
        log.warning("run %s was deleted; a new one takes its place", run_id)
        return None
    return run


def open_sweep(
    uri: str, job: JobConfig, *, run_id: str | None, name: str, tags: Mapping[str, str], texts: Mapping[str, str]
) -> str:
    """Create the parent run of a sweep over `job`, or go on with run `run_id`; return the run's id. `texts` are its
    artifacts. Raises RunError as :func:`open_run`."""
    try:
        client = build_client(uri)
        run = _find_run(client, run_id) if run_id else None
        if run is None:
            experiment_id = _experiment_id(client, job.tracking.experiment, _artifact_root(uri, job))
            known = {"mlflow.user": _user(), "mlflow.source.name": "temper", "mlflow.source.type": "LOCAL"}
            run = client.create_run(experiment_id, tags={**known, **tags}, run_name=name)
            for path, text in texts.items():
                client.log_text(run.info.run_id, redact_yaml(text) if path.endswith(".yaml") else text, path)
        client.update_run(run.info.run_id, status="RUNNING")
    except Exception as error:  # as in open_run
        raise RunError(f"tracking.uri: {redact_text(uri)} cannot be used: {first_line(error)}") from error
    return str(run.info.run_id)


def log_results(uri: str, run_id: str, metrics: Mapping[str, float], tags: Mapping[str, str]) -> None:
    """Sets final metrics and tags of a run. Raises RunError where the store does not take them."""
    from mlflow.entities import Metric, RunTag

    now = int(time.time() * 1000)
    try:
        build_client(uri).log_batch(
            run_id,
            metrics=[Metric(metric_name(name), float(value), now, 0) for name, value in metrics.items()],
            tags=[RunTag(key, value[:_TAG_LENGTH]) for key, value in tags.items()],
            synchronous=True,
        )
    except Exception as error:  # as in open_run
        raise RunError(f"tracking.uri: {redact_text(uri)} does not take results: {first_line(error)}") from error


def _create_run(client: MlflowClient, uri: str, plan: Plan, name: str, tags: Mapping[str, str]) -> Run:
    experiment_id = _experiment_id(client, plan.job.tracking.experiment, _artifact_root(uri, plan.job))
    return client.create_run(experiment_id, tags={"mlflow.user": _user(), **tags}, run_name=name)


def _experiment_id(client: MlflowClient, name: str, artifact_root: str | None) -> str:
    from mlflow.exceptions import MlflowException

    experiment = client.get_experiment_by_name(name)
    if experiment is None:
        try:
            return client.create_experiment(name, artifact_location=artifact_root)
        except MlflowException as error:
            if error.error_code != "RESOURCE_ALREADY_EXISTS":
                raise
            experiment = client.get_experiment_by_name(name)  # another process was faster
    if experiment is None:
        raise RunError(f"experiment {name} appeared and vanished again; start once more")
    if experiment.lifecycle_stage == "deleted":
        log.warning("experiment %s had been deleted; it is restored for this run", name)
        client.restore_experiment(experiment.experiment_id)
    return experiment.experiment_id


def _artifact_root(uri: str, job: JobConfig) -> str | None:
    """Beside the database for SQLite (MLflow's default is `./mlruns`, wherever that is); a server knows its own."""
    if uri.startswith("sqlite:///"):
        return str(job.storage_folder.absolute() / "artifacts")
    return None


def _user() -> str:
    try:
        return getpass.getuser()
    except (OSError, KeyError):  # a container's user need not have a name
        return f"uid-{os.getuid()}"


def first_line(error: BaseException) -> str:
    return redact_text(next(iter(str(error).splitlines()), "") or type(error).__name__)


# --------------------------------------------------------------------------------------------- what describes a run


def _log_description(client: MlflowClient, run: Run, plan: Plan, *, job_yaml: str, command: str) -> None:
    from mlflow.entities import Param, RunTag

    git = git_state(Path.cwd())
    # Parameters are immutable in MLflow: what the run has is left alone, also where a resumed job says it differently.
    params = [Param(key, value) for key, value in parameters(plan).items() if key not in run.data.params]
    for begin in range(0, len(params), _BATCH_PARAMS):
        client.log_batch(run.info.run_id, params=params[begin : begin + _BATCH_PARAMS], synchronous=True)
    tags = {key: value for key, value in _tags(plan, git, command).items() if key not in run.data.tags}
    client.log_batch(run.info.run_id, tags=[RunTag(key, value) for key, value in tags.items()], synchronous=True)
    present = {artifact.path for artifact in client.list_artifacts(run.info.run_id)}
    for name, text in _artifacts(plan, git, job_yaml).items():
        if name not in present:
            client.log_text(run.info.run_id, text, name)


def parameters(plan: Plan) -> dict[str, str]:
    """The job flattened to dotted keys, as in an override, and what the plan derived from it under `plan.`.

    Values are written as in YAML; lists stay whole. Within MLflow's limits on length, and without secrets.
    """
    batch = plan.batch
    derived = {"steps": plan.steps, "micro_batch": batch.micro_batch, "accumulation": batch.accumulation}
    values = redact_values({**plan.job.model_dump(mode="json"), "plan": derived})
    return {metric_name(key): _value_text(value)[:_PARAM_LENGTH] for key, value in _flatten(values)}


def _flatten(values: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    for key, value in values.items():
        if isinstance(value, dict) and value:
            yield from _flatten(value, f"{prefix}{key}.")
        else:
            yield f"{prefix}{key}", value


def _value_text(value: Any) -> str:
    return value if isinstance(value, str) else json.dumps(value)


def _tags(plan: Plan, git: GitState | None, command: str) -> dict[str, str]:
    tags = {
        "mlflow.source.name": "temper",
        "mlflow.source.type": "LOCAL",
        "temper.fingerprint": plan.fingerprint,
        "temper.command": redact_text(command)[:_TAG_LENGTH],
        "temper.version": temper.__version__,
    }
    if git is not None:
        tags["mlflow.source.git.commit"] = git.commit
        tags["mlflow.source.git.branch"] = git.branch
        tags["temper.git.dirty"] = str(git.dirty).lower()
    return tags


def _artifacts(plan: Plan, git: GitState | None, job_yaml: str) -> dict[str, str]:
    artifacts = {
        "job.yaml": redact_yaml(job_yaml),
        "plan.json": json.dumps(redact_values(plan.to_dict()), indent=2) + "\n",
        "environment.txt": environment_text(),
    }
    if git is not None:
        artifacts["git.json"] = json.dumps(git.to_dict(), indent=2) + "\n"
    if git is not None and git.diff:
        artifacts["git.diff"] = redact_text(git.diff)
    return artifacts


def redact_yaml(text: str) -> str:
    """The file as it was written where that is safe; otherwise, as for a secret over several lines, written anew."""
    values = yaml.safe_load(text)
    redacted = redact_values(values)
    return redact_text(text if redacted == values else yaml.safe_dump(redacted, sort_keys=False))


# ------------------------------------------------------------------------------------------------- metrics of a run


class RunMetrics:
    """The metrics of one run. Not thread-safe. Every method raises whatever the store raises."""

    def __init__(self, uri: str, run_id: str) -> None:
        self._client = build_client(uri)
        self._uri = uri
        self._run_id = run_id

    def last_step(self) -> int:
        """The last step of which the store has the whole record; 0 for none."""
        metrics = _latest(self._client.get_run(self._run_id))
        return max((metric.step for metric in metrics if metric.key == PROGRESS_METRIC), default=0)

    def send(self, records: Sequence[Record]) -> None:
        """Log whole records, in one request where they have at most 1,000 metrics. Raises RefusedError where the store
        is well and will not take them; after any other error, only :meth:`last_step` knows what arrived."""
        from mlflow.exceptions import MlflowException

        metrics = [metric for record in records for metric in _entities(record)]
        try:
            for begin in range(0, len(metrics), BATCH_METRICS):
                part, tags = metrics[begin : begin + BATCH_METRICS], _tags_of(records) if begin == 0 else []
                self._client.log_batch(self._run_id, metrics=part, tags=tags, synchronous=True)
        except MlflowException as error:
            if error.error_code == "INVALID_PARAMETER_VALUE" and self._run_is_active():
                raise RefusedError(first_line(error)) from error
            raise

    def _run_is_active(self) -> bool:
        # Writing to a run that somebody deleted fails with the same code as a bad value, but may be undone.
        return self._client.get_run(self._run_id).info.lifecycle_stage == "active"

    def watch_system(self) -> SystemMetrics:
        """Start logging the use of CPU, memory, disk, network and GPUs of this machine to the run."""
        return SystemMetrics(self._uri, self._run_id)


class SystemMetrics:
    """MLflow's monitor of the machine; ends by itself when the store fails or the run is closed."""

    def __init__(self, uri: str, run_id: str) -> None:
        from mlflow.system_metrics.system_metrics_monitor import SystemMetricsMonitor

        self._monitor = SystemMetricsMonitor(
            run_id, sampling_interval=_SYSTEM_INTERVAL_S, resume_logging=True, tracking_uri=uri
        )
        self._monitor.start()

    @property
    def alive(self) -> bool:
        """Whether it still logs."""
        thread = self._monitor._process
        return thread is not None and thread.is_alive()

    def stop(self, timeout_s: float = 2.0) -> None:
        """End it; waits at most `timeout_s`, because its last request may hang on a dead server."""
        stopping = threading.Thread(target=self._monitor.finish, daemon=True)
        stopping.start()
        stopping.join(timeout_s)


def _latest(run: Run) -> list[Metric]:
    """The latest point of each metric. `run.data.metrics` has the values only; the history would be all points."""
    return list(run.data._metric_objs)


def _entities(record: Record) -> list[Metric]:
    """The record's metrics with the progress metric last, so that it arrives only if all of them do."""
    from mlflow.entities import Metric

    names = sorted(record["metrics"], key=lambda name: name == PROGRESS_METRIC)
    return [
        Metric(metric_name(name), float(record["metrics"][name]), record["time_ms"], record["step"]) for name in names
    ]


def _tags_of(records: Sequence[Record]) -> list[RunTag]:
    """The newest event, as a tag; nothing where no record has one."""
    from mlflow.entities import RunTag

    newest = [f"step {record['step']}: {event}" for record in records for event in record.get("events", [])][-1:]
    return [RunTag(LAST_NON_FINITE, redact_text(text)[:_TAG_LENGTH]) for text in newest]


def metric_name(name: str) -> str:
    """`name` with what MLflow does not allow in names of metrics and parameters replaced, at most 250 characters."""
    parts = [part for part in re.sub(r"[^\w\-./ :]", "_", name).split("/") if part.strip(".")]
    return "/".join(parts)[:_KEY_LENGTH].rstrip("/") or "_"
