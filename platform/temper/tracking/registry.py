"""MLflow's model registry: an export goes there as a version of a registered model, and comes back as a teacher.

An export is a logged model of the run that trained it, which MLflow shows with the run, and a version is of that. As in
:mod:`mlflow_store`, mlflow is imported only inside functions. What is asked for and not there is None; a store that
cannot be reached or does not take something is a RunError.
"""

from __future__ import annotations

import contextlib
import json
import re
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, TypeVar

from temper.errors import JobError, Problem, RunError
from temper.tracking.description import metric_name
from temper.tracking.mlflow_store import build_client, first_line
from temper.tracking.redact import redact_text

if TYPE_CHECKING:
    from mlflow import MlflowClient
    from mlflow.entities import LoggedModel

Answer = TypeVar("Answer")

PHASE = "temper.phase"
"""The tag of a version, and of its logged model, that names the phase whose product it is."""

_NOT_THERE = ("RESOURCE_DOES_NOT_EXIST", "INVALID_PARAMETER_VALUE")  # the latter for an alias that no version has
_VERSIONS = "mlflow.modelVersions"  # by this tag of a logged model MLflow's pages lead to its versions


@dataclass(frozen=True)
class Export:
    """What becomes a version of the registered model `name`: the files in `folder`, the product of run `run_id`.

    `title` is what MLflow calls the logged model. `metrics` are names of the run's metrics that are told of it, too.
    """

    name: str
    run_id: str
    folder: Path
    title: str
    tags: Mapping[str, str]
    description: str
    metrics: tuple[str, ...]


def register_export(uri: str, export: Export) -> str:
    """Makes a logged model of the export, and a version of that; returns the version. The registered model is created
    where there is none."""

    def register(client: MlflowClient) -> str:
        _create_model(client, export.name)
        experiment_id = client.get_run(export.run_id).info.experiment_id
        with _new_logged_model(client, experiment_id, export) as logged:
            _name_flavor(export, logged)
            client.log_model_artifacts(logged.model_id, str(export.folder))
        _link_run(client, export, logged)
        version = str(
            client.create_model_version(
                export.name,
                logged.artifact_location,  # MLflow looks `models:/<model id>` up in the store of the environment
                export.run_id,
                tags=dict(export.tags),
                description=f"{export.description}\n\n{_link(experiment_id, export.run_id)}",
                model_id=logged.model_id,
                await_creation_for=0,
            ).version
        )
        client.set_logged_model_tags(
            logged.model_id, {_VERSIONS: json.dumps([{"name": export.name, "version": version}])}
        )
        return version

    return _told(uri, register)


@contextlib.contextmanager
def _new_logged_model(client: MlflowClient, experiment_id: str, export: Export) -> Iterator[LoggedModel]:
    """A logged model whose files are to be logged; it is ready when they are."""
    title = re.sub(r"[/:.%\"']", "-", export.title)  # what MLflow takes in no name of a logged model
    logged = client.create_logged_model(experiment_id, title, export.run_id, tags=dict(export.tags))
    try:
        yield logged
    except BaseException:
        with contextlib.suppress(Exception):  # the first error is told
            client.finalize_logged_model(logged.model_id, "FAILED")
        raise
    client.finalize_logged_model(logged.model_id, "READY")


def _link(experiment_id: str, run_id: str) -> str:
    """Leads, in MLflow's pages, to the run."""
    return f"[The run that trained it](#/experiments/{experiment_id}/runs/{run_id})"


def _name_flavor(export: Export, logged: LoggedModel) -> None:
    """Says in the MLflow model, if the export is one, which run's and which logged model it is."""
    from mlflow.models import Model

    file = export.folder / "MLmodel"
    if file.is_file():
        model = Model.load(str(file))
        model.run_id, model.model_id, model.artifact_path = export.run_id, logged.model_id, logged.artifact_location
        model.save(str(file))


def _link_run(client: MlflowClient, export: Export, logged: LoggedModel) -> None:
    """Shows the model among the run's outputs, and with the last points of its metrics. Points that the run has are
    sent again with the model's id, as MLflow does it itself: the run does not have them twice."""
    from mlflow.entities import LoggedModelOutput, Metric

    names = {metric_name(name) for name in export.metrics}
    latest = [metric for metric in client.get_run(export.run_id).data._metric_objs if metric.key in names]
    points = [
        Metric(last.key, last.value, last.timestamp, last.step, model_id=logged.model_id, run_id=export.run_id)
        for last in latest
    ]
    step = max((point.step for point in points), default=0)
    client.log_outputs(export.run_id, [LoggedModelOutput(logged.model_id, step)])
    client.log_batch(export.run_id, metrics=points, synchronous=True)


def check_name(name: str, alias: str | None) -> None:
    """Raises JobError where MLflow takes no registered model of this name, or no such alias."""
    problems = []
    if re.search("[/:]", name) or name != name.strip() or name in ("", ".") or name.startswith(".."):
        rule = "is not a name that MLflow takes for a registered model"
        problems.append(Problem("--register", name, rule, "use one without /, : and spaces around it"))
    if alias is not None and (not re.fullmatch(r"[\w-]{1,255}", alias) or re.fullmatch("(?i)latest|v[0-9]+", alias)):
        rule = "is not an alias that MLflow takes"
        problems.append(Problem("--alias", alias, rule, "use letters, digits, _ and -, but not latest or v1, v2, …"))
    if problems:
        raise JobError(problems)


def _create_model(client: MlflowClient, name: str) -> None:
    from mlflow.exceptions import MlflowException

    try:
        client.create_registered_model(name)
    except MlflowException as error:
        if error.error_code != "RESOURCE_ALREADY_EXISTS":
            raise


def find_version(uri: str, name: str, run_id: str, tags: Mapping[str, str]) -> str | None:
    """The newest version of the registered model `name` that is of this run and has these tags."""

    def find(client: MlflowClient) -> str | None:
        versions = [
            int(version.version)
            for version in client.search_model_versions(f"run_id = '{run_id}'")
            if version.name == name and tags.items() <= version.tags.items()
        ]
        return str(max(versions)) if versions else None

    return _asked(uri, find)


def version_tags(uri: str, name: str, version: str) -> dict[str, str] | None:
    """The tags of a version of a registered model."""
    return _asked(uri, lambda client: dict(client.get_model_version(name, version).tags))


def versions_beside(uri: str, name: str, version: str, within_s: float) -> dict[str, dict[str, str]]:
    """The tags of the versions of a registered model that were made at about the same time as `version`, with it; by
    version. Empty where there is no such version."""

    def find(client: MlflowClient) -> dict[str, dict[str, str]]:
        made_ms = client.get_model_version(name, version).creation_timestamp
        quote = '"' if "'" in name else "'"
        newest = client.search_model_versions(f"name = {quote}{name}{quote}", 100, ["version_number DESC"])
        near = (each for each in newest if abs(each.creation_timestamp - made_ms) <= 1000 * within_s)
        return {str(each.version): dict(each.tags) for each in near}

    return _asked(uri, find) or {}


def set_alias(uri: str, name: str, alias: str, version: str) -> None:
    """Gives the alias to the version, whichever had it before."""
    _told(uri, lambda client: client.set_registered_model_alias(name, alias, version))


def resolve_alias(uri: str, name: str, alias: str) -> str | None:
    """The version of the registered model `name` that has the alias now."""
    return _asked(uri, lambda client: str(client.get_model_version_by_alias(name, alias).version))


def download_version(uri: str, name: str, version: str, to: Path) -> Path | None:
    """Copies the files of a version of a registered model into the folder `to`; the folder there that has them."""

    def download(client: MlflowClient) -> Path:
        from mlflow.artifacts import download_artifacts

        source = client.get_model_version_download_uri(name, version)
        return Path(download_artifacts(artifact_uri=source, dst_path=str(to), tracking_uri=uri))

    return _asked(uri, download)


def run_tags(uri: str, run_id: str) -> dict[str, str] | None:
    """The tags of a run."""
    return _asked(uri, lambda client: dict(client.get_run(run_id).data.tags))


def download_run_export(uri: str, run_id: str, phase: str, to: Path) -> Path | None:
    """Copies the newest export of the run's phase into the folder `to`; the folder there that has it."""

    def download(client: MlflowClient) -> Path | None:
        from mlflow.artifacts import download_artifacts

        models = client.search_logged_models(
            [client.get_run(run_id).info.experiment_id],
            filter_string=f"source_run_id = '{run_id}' AND tags.`{PHASE}` = '{phase}'",
            order_by=[{"field_name": "creation_timestamp", "ascending": False}],
        )
        ready = [model.artifact_location for model in models if str(model.status) == "READY"]
        if not ready:
            return None
        return Path(download_artifacts(artifact_uri=ready[0], dst_path=str(to), tracking_uri=uri))

    return _asked(uri, download)


def _asked(uri: str, ask: Callable[[MlflowClient], Answer]) -> Answer | None:
    """The store's answer; None where it has not what it is asked for. A database that is not there is not made."""
    if uri.startswith("sqlite:///") and "?" not in uri and not Path(uri.removeprefix("sqlite:///")).exists():
        return None
    from mlflow.exceptions import MlflowException

    try:
        return ask(build_client(uri))
    except MlflowException as error:
        if error.error_code in _NOT_THERE:
            return None
        raise _failure(uri, error) from error
    except Exception as error:  # which one depends on the store: sqlalchemy's, requests', OSError
        raise _failure(uri, error) from error


def _told(uri: str, tell: Callable[[MlflowClient], Answer]) -> Answer:
    try:
        return tell(build_client(uri))
    except Exception as error:  # as in _asked
        raise _failure(uri, error) from error


def _failure(uri: str, error: Exception) -> RunError:
    return RunError(f"MLflow at {redact_text(uri)}: {first_line(error)}")
