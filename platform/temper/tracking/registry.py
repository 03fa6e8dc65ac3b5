"""MLflow's model registry: an export goes there as a version of a registered model, and comes back as a teacher.

As in :mod:`mlflow_store`, mlflow is imported only inside functions. What is asked for and not there is None; a store
that cannot be reached or does not take something is a RunError.
"""

from __future__ import annotations

import re
import tempfile
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, TypeVar

from temper.errors import JobError, Problem, RunError
from temper.tracking.mlflow_store import build_client, first_line
from temper.tracking.redact import redact_text

if TYPE_CHECKING:
    from mlflow import MlflowClient

Answer = TypeVar("Answer")

EXPORT = "export"
"""The folder of a run's artifacts that its exports are in: `export/<phase>/<checkpoint>/<number>/`. A number, counted
from 1, is never written again: a version of a registered model is its files."""

_NOT_THERE = ("RESOURCE_DOES_NOT_EXIST", "INVALID_PARAMETER_VALUE")  # the latter for an alias that no version has


def register_export(
    uri: str, run_id: str, files: Mapping[str, Path], texts: Mapping[str, str], path: str, name: str, alias: str | None
) -> str:
    """Logs `files` and `texts`, by their names, as the run's artifacts `export/<path>/<number>/`, makes them a version
    of the registered model `name`, which is created where there is none, and gives it the alias. `path` is
    `<phase>/<checkpoint>`, and the number a new one. Returns the version."""

    def register(client: MlflowClient) -> str:
        _create_model(client, name)
        place = f"{EXPORT}/{path}/{max(_numbers(client, run_id, f'{EXPORT}/{path}'), default=0) + 1}"
        with tempfile.TemporaryDirectory() as folder:
            for file_name, file in files.items():
                (Path(folder) / file_name).symlink_to(file.absolute())
            for file_name, text in texts.items():
                (Path(folder) / file_name).write_text(text)
            client.log_artifacts(run_id, folder, place)
        source = f"{client.get_run(run_id).info.artifact_uri.rstrip('/')}/{place}"
        version = str(client.create_model_version(name, source, run_id).version)
        if alias is not None:
            client.set_registered_model_alias(name, alias, version)
        return version

    return _told(uri, register)


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


def _numbers(client: MlflowClient, run_id: str, folder: str) -> list[int]:
    """Of the exports of a checkpoint in the artifacts' folder `export/<phase>/<checkpoint>`."""
    return [int(Path(item.path).name) for item in client.list_artifacts(run_id, folder) if item.is_dir]


def _create_model(client: MlflowClient, name: str) -> None:
    from mlflow.exceptions import MlflowException

    try:
        client.create_registered_model(name)
    except MlflowException as error:
        if error.error_code != "RESOURCE_ALREADY_EXISTS":
            raise


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
        checkpoints = [item.path for item in client.list_artifacts(run_id, f"{EXPORT}/{phase}") if item.is_dir]
        if not checkpoints:
            return None
        newest = max(_numbers(client, run_id, max(checkpoints)))
        return Path(client.download_artifacts(run_id, f"{max(checkpoints)}/{newest}", str(to)))

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
