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
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from temper.config.schema import JobConfig
from temper.errors import RunError
from temper.files import read_json
from temper.tracking.description import (
    TAG_LENGTH,
    dataset_input,
    metric_name,
    parameters,
    redact_yaml,
    run_files,
    run_tags,
    safe_params,
    safe_tags,
)
from temper.tracking.history import Record
from temper.tracking.redact import redact_text

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

BATCH_METRICS = 1000  # MLflow's limits on one request
_BATCH_PARAMS = 100

# Unless the user has set them. By default an unreachable server blocks a call for minutes; MLflow's asynchronous
# logging loses points; its usage reports have no place in a training job.
_ENVIRONMENT = {
    "MLFLOW_HTTP_REQUEST_MAX_RETRIES": "1",
    "MLFLOW_HTTP_REQUEST_BACKOFF_FACTOR": "1",
    "MLFLOW_HTTP_REQUEST_TIMEOUT": "10",
    "MLFLOW_HTTP_RESPECT_RETRY_AFTER_HEADER": "false",  # which lets a server put a call to sleep for an hour
    "MLFLOW_LOGGING_LEVEL": "WARNING",
    "MLFLOW_DISABLE_TELEMETRY": "true",
    "MLFLOW_ENABLE_ARTIFACTS_PROGRESS_BAR": "false",
    "MLFLOW_SUPPRESS_PRINTING_URL_TO_STDOUT": "true",  # where `--json` has its result
}


_REFUSALS = {
    "UNAUTHENTICATED": "set MLFLOW_TRACKING_USERNAME and MLFLOW_TRACKING_PASSWORD",
    "PERMISSION_DENIED": "ask who made the experiment for the permission EDIT, or set tracking.experiment",
}
"""What a user can do, by MLflow's code for why it refuses."""


_TOKEN = "temper.token"


class RefusedError(Exception):
    """The store is up and will never take these metrics as they are."""


class RunGoneError(Exception):
    """The store is up and does not have the run, or not any more."""


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


def check_access(uri: str, experiment: str) -> None:
    """Raises RunError where a server is up and refuses this user; one that is away is no reason to wait."""
    if not uri.startswith(("http://", "https://")):
        return
    try:
        build_client(uri).get_experiment_by_name(experiment)
    except Exception as error:  # which one depends on the store
        remedy = _REFUSALS.get(getattr(error, "error_code", ""))
        if remedy is not None:
            what = f"tracking.uri: {redact_text(uri)} refuses this user ({first_line(error)})"
            raise RunError(f"{what}; {remedy}") from error


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
    params: Mapping[str, str] | None = None,
    began_ms: int | None = None,
    token: str | None = None,
) -> str:
    """Create the run of `plan`, or go on with run `run_id`; return the run's id. A new one has the job's name unless
    another is given, the `tags`, of which `temper.kind` is `run` unless they say otherwise, and the `params` beside
    those of the job. It began at `began_ms`, by default now; `created` is called with its id before anything else is
    logged. `token` is a tag of the run by which it is found again where its id was not learnt.

    Parameters, tags and artifacts are logged when the run is created; when it is continued, only what is missing. A run
    that was deleted meanwhile is replaced by a new one. Nothing that is logged holds a secret: see :mod:`redact`.
    Raises RunError where the store cannot be reached or used.
    """
    try:
        client = build_client(uri)
        run = _find_run(client, run_id) if run_id else None
        if run is None:
            experiment_id = _experiment_id(client, plan.job.tracking.experiment, _artifact_root(uri, plan.job))
            known = {**run_tags(plan, command), "temper.kind": "run", **(tags or {})}
            run = _run_of(client, experiment_id, token) if token else None
            marked = {**known, **({_TOKEN: token} if token else {})}
            run = run or create_run(client, experiment_id, name or plan.job.name, marked, began_ms)
            created(str(run.info.run_id))
        client.update_run(run.info.run_id, status="RUNNING")
        _log_description(client, run, plan, job_yaml=job_yaml, command=command, params=params or {})
    except Exception as error:  # which one depends on the store: MlflowException, sqlalchemy's, requests', OSError
        remedy = _REFUSALS.get(getattr(error, "error_code", ""), "start the server or set tracking.uri")
        if "schema" in str(error) and "upgrade" in str(error):
            remedy = "run `mlflow db upgrade` on it, after a backup"
        raise RunError(f"tracking.uri: {redact_text(uri)} cannot be used: {first_line(error)}; {remedy}") from error
    return str(run.info.run_id)


def log_tags(uri: str, run_id: str, tags: Mapping[str, str]) -> None:
    """Sets tags of a run. Raises RunError where the store does not take them."""
    from mlflow.entities import RunTag

    try:
        build_client(uri).log_batch(run_id, tags=[RunTag(*tag) for tag in safe_tags(tags).items()], synchronous=True)
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
    except Exception as error:  # as in open_run
        what = f"tracking.uri: {redact_text(uri)} does not take the certificate"
        raise RunError(f"{what}: {first_line(error)}") from error


def close_run(uri: str, run_id: str, status: RunStatus, timeout_s: float = 10.0, ended_ms: int | None = None) -> bool:
    """Give the run its terminal status, by default as of now; false, with a line in the log, where the store does not
    take it in time."""
    return persist(lambda: build_client(uri).set_terminated(run_id, status, ended_ms), f"status {status}", timeout_s)


def persist(action: Callable[[], object], what: str, timeout_s: float) -> bool:
    """Has the store take something, and tries again for a while where it does not; false, with a line in the log, where
    it took it at no time."""
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


@dataclass(frozen=True)
class OpenRun:
    """A run that is RUNNING, and the folder in its storage that it says is its."""

    run_id: str
    name: str
    run_folder: str
    kind: str


def find_open_runs(uri: str, storage_id: str) -> list[OpenRun]:
    """The runs in a store that are RUNNING and belong to the storage with this id. Raises RunError where the store
    cannot be asked."""
    condition = f"attributes.status = 'RUNNING' and tags.`temper.storage.id` = '{storage_id}'"
    try:
        client = build_client(uri)
        pages = partial(client.search_experiments, max_results=1000)
        experiments = [experiment.experiment_id for experiment in _all(pages)]
        runs = _all(partial(client.search_runs, experiments, condition, max_results=1000)) if experiments else []
        return [_open_run(run) for run in runs]
    except Exception as error:  # as in open_run
        raise RunError(f"tracking.uri: {redact_text(uri)} cannot be asked: {first_line(error)}") from error


def _find_run(client: MlflowClient, run_id: str) -> Run | None:
    try:
        return fetch_run(client, run_id)
    except RunGoneError as error:
        log.warning("%s; a new one takes its place", error)
        return None


def open_parent(
    uri: str,
    job: JobConfig,
    *,
    run_id: str | None,
    name: str,
    tags: Mapping[str, str],
    params: Mapping[str, str],
    texts: Mapping[str, str],
    began_ms: int | None = None,
    created: Callable[[str], None] = lambda run_id: None,
) -> str:
    """Create the parent run of a sweep over `job`, or go on with run `run_id`; return the run's id. `texts` are its
    artifacts, by their paths; it began at `began_ms`, by default now. `created` is called, what is missing is logged,
    and RunError raised as by :func:`open_run`."""
    from mlflow.entities import Param

    try:
        client = build_client(uri)
        run = _find_run(client, run_id) if run_id else None
        if run is None:
            experiment_id = _experiment_id(client, job.tracking.experiment, _artifact_root(uri, job))
            run = create_run(client, experiment_id, name, tags, began_ms)
            created(str(run.info.run_id))
        client.update_run(run.info.run_id, status="RUNNING")
        new = [Param(key, value) for key, value in safe_params(params).items() if key not in run.data.params]
        for begin in range(0, len(new), _BATCH_PARAMS):
            client.log_batch(run.info.run_id, params=new[begin : begin + _BATCH_PARAMS], synchronous=True)
        present = {artifact.path for artifact in client.list_artifacts(run.info.run_id)}
        for path, text in texts.items():
            if path not in present:
                client.log_text(run.info.run_id, redact_yaml(text) if path.endswith(".yaml") else text, path)
    except Exception as error:  # as in open_run
        raise RunError(f"tracking.uri: {redact_text(uri)} cannot be used: {first_line(error)}") from error
    return str(run.info.run_id)


def log_final(client: MlflowClient, run: Run, metrics: Mapping[str, float], tags: Mapping[str, str]) -> None:
    """Sets what a run came to; a value that the run has already is not logged again. Raises what the store raises."""
    from mlflow.entities import Metric, RunTag

    now, known = int(time.time() * 1000), run.data.metrics
    named = {metric_name(name): float(value) for name, value in metrics.items()}
    new = [Metric(name, value, now, 0) for name, value in named.items() if repr(known.get(name)) != repr(value)]
    entries = [RunTag(key, value) for key, value in safe_tags(tags).items()]
    client.log_batch(run.info.run_id, metrics=new, tags=entries, synchronous=True)


def log_outcome(
    uri: str,
    run_id: str,
    metrics: Mapping[str, float],
    tags: Mapping[str, str],
    texts: Mapping[str, str],
    note: Callable[[str], str],
) -> None:
    """Sets what a sweep came to; `texts` are artifacts by their paths, and `note`, called with the experiment's id, is
    the run's description. Raises RunError where the store does not take it."""
    try:
        client = build_client(uri)
        run = client.get_run(run_id)
        log_final(client, run, metrics, {**tags, "mlflow.note.content": note(run.info.experiment_id)})
        for path, text in texts.items():
            client.log_text(run_id, text, path)
    except Exception as error:  # as in open_run
        raise RunError(f"tracking.uri: {redact_text(uri)} does not take results: {first_line(error)}") from error


def _run_of(client: MlflowClient, experiment_id: str, token: str) -> Run | None:
    """The run that a command created whose answer, or which itself, was lost."""
    found = client.search_runs([experiment_id], f"tags.`{_TOKEN}` = '{token}'", max_results=1)
    return found[0] if found else None


def create_run(
    client: MlflowClient, experiment_id: str, name: str, tags: Mapping[str, str], started_ms: int | None = None
) -> Run:
    """A new run, begun now unless another time is given. Raises ConnectionError where the answer names none, as behind
    a proxy that answers in the server's place."""
    known = {"mlflow.user": _user(), **safe_tags(tags)}
    run = client.create_run(experiment_id, start_time=started_ms, tags=known, run_name=name)
    if not run.info.run_id:
        raise ConnectionError("the answer to a new run was empty")
    return run


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


def _log_description(
    client: MlflowClient, run: Run, plan: Plan, *, job_yaml: str, command: str, params: Mapping[str, str]
) -> None:
    from mlflow.entities import Param, RunTag

    run_id = run.info.run_id
    # Parameters are immutable in MLflow: what the run has is left alone, also where a resumed job says it differently.
    known = run.data.params
    new = [Param(key, value) for key, value in {**parameters(plan), **safe_params(params)}.items() if key not in known]
    for begin in range(0, len(new), _BATCH_PARAMS):
        client.log_batch(run_id, params=new[begin : begin + _BATCH_PARAMS], synchronous=True)
    tags = {key: value for key, value in run_tags(plan, command).items() if key not in run.data.tags}
    client.log_batch(run_id, tags=[RunTag(key, value) for key, value in tags.items()], synchronous=True)
    if not run.inputs.dataset_inputs:
        client.log_inputs(run_id, [dataset_input(plan)])
    present = {artifact.path for artifact in client.list_artifacts(run_id)}
    for name, text in run_files(plan, job_yaml).items():
        if name not in present:
            client.log_text(run_id, text, name)


# ------------------------------------------------------------------------------------------------- metrics of a run


def _open_run(run: Run) -> OpenRun:
    tags = run.data.tags
    return OpenRun(run.info.run_id, run.info.run_name, tags.get("temper.run_folder", ""), tags.get("temper.kind", ""))


def _all(search: Callable[..., Any]) -> list[Any]:
    """What all pages of a search have."""
    found, token = [], None
    while True:
        page = search(page_token=token)
        found += page
        token = page.token
        if not token:
            return found


def fetch_run(client: MlflowClient, run_id: str) -> Run:
    """The run as the store has it.

    Raises RunGoneError where the store says that it does not have the run, or that the run was deleted; ConnectionError
    where the answer is not about the run; and whatever else the store raises.
    """
    from mlflow.exceptions import MlflowException

    try:
        run = client.get_run(run_id)
    except MlflowException as error:
        # A proxy's "404 Not Found" has another code: only the store itself says this.
        if error.error_code == "RESOURCE_DOES_NOT_EXIST":
            raise RunGoneError(f"run {run_id} is not in this store") from error
        raise
    if run.info.run_id != run_id:
        # MLflow's client takes an empty answer for an empty run.
        raise ConnectionError(f"the answer to a question about run {run_id} is not about it")
    if run.info.lifecycle_stage == "deleted":
        raise RunGoneError(f"run {run_id} was deleted")
    return run


def is_progress(name: str) -> bool:
    """See PROGRESS_METRIC."""
    return name == PROGRESS_METRIC


def is_system_progress(name: str) -> bool:
    """As PROGRESS_METRIC, for samples of nodes: see :mod:`system_metrics`."""
    return name.startswith("system/") and name.endswith("/cpu_utilization_percentage")


class RunMetrics:
    """The metrics of one run that come as records, each with a metric that `progress` picks. Not thread-safe.

    Every method raises RunGoneError where the store does not have the run, and whatever else the store raises.
    """

    def __init__(self, uri: str, run_id: str, progress: Callable[[str], bool] = is_progress) -> None:
        self._client = build_client(uri)
        self._run_id = run_id
        self._progress = progress

    def last_step(self) -> int:
        """The last step of which the store has the whole record; 0 for none."""
        metrics = _latest(fetch_run(self._client, self._run_id))
        return max((metric.step for metric in metrics if self._progress(metric.key)), default=0)

    def send(self, records: Sequence[Record]) -> None:
        """Log whole records, in one request where they have at most 1,000 metrics, and make sure that they are there.

        MLflow's client takes an empty answer, as of a proxy, for success. Raises RefusedError where the store is well
        and will not take them; after any other error, only :meth:`last_step` knows what arrived.
        """
        from mlflow.exceptions import MlflowException

        metrics = [metric for record in records for metric in self._entities(record)]
        try:
            for begin in range(0, len(metrics), BATCH_METRICS):
                part, tags = metrics[begin : begin + BATCH_METRICS], _tags_of(records) if begin == 0 else []
                self._client.log_batch(self._run_id, metrics=part, tags=tags, synchronous=True)
        except MlflowException as error:
            if error.error_code == "INVALID_PARAMETER_VALUE":
                fetch_run(self._client, self._run_id)  # writing to a deleted run fails with this code, too
                raise RefusedError(first_line(error)) from error
            raise
        stored = {metric.key: metric.step for metric in _latest(fetch_run(self._client, self._run_id))}
        lost = [metric for metric in metrics if stored.get(metric.key, 0) < metric.step]
        if lost:
            raise ConnectionError(f"step {lost[0].step} was taken and is not there: {lost[0].key}")

    def _entities(self, record: Record) -> list[Metric]:
        """The record's metrics with the progress metric last, so that it arrives only if all of them do."""
        from mlflow.entities import Metric

        values, time_ms, step = record["metrics"], record["time_ms"], record["step"]
        return [
            Metric(metric_name(name), float(values[name]), time_ms, step) for name in sorted(values, key=self._progress)
        ]


def _latest(run: Run) -> list[Metric]:
    """The latest point of each metric. `run.data.metrics` has the values only; the history would be all points."""
    return list(run.data._metric_objs)


def _tags_of(records: Sequence[Record]) -> list[RunTag]:
    """The newest event, as a tag; nothing where no record has one."""
    from mlflow.entities import RunTag

    newest = [f"step {record['step']}: {event}" for record in records for event in record.get("events", [])][-1:]
    return [RunTag(LAST_NON_FINITE, redact_text(text)[:TAG_LENGTH]) for text in newest]
