"""A job file and dotted overrides → JobConfig, with every problem of both at once; and back to text."""

from __future__ import annotations

import difflib
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from temper.config.explain import explain
from temper.config.schema import JobConfig
from temper.config.text import MAX_BYTES, format_yaml, parse_yaml
from temper.errors import JobError, Problem

_OVERRIDE = re.compile(r"^(?P<key>[^\s=.]+(?:\.[^\s=.]+)*)=(?P<value>.*)$", re.DOTALL)


def load_job(path: str | Path, overrides: Sequence[str] = ()) -> JobConfig:
    """Read a job from a YAML file and apply `a.b.c=value` overrides to it before it is checked.

    Rules across sections are checked with the plan, which knows more. Raises JobError with every problem found, and no
    other exception, whatever the file holds.
    """
    raw = parse_yaml(read_text(path, "job"), printable(str(path)))
    return build_job(raw, overrides, source=printable(str(path)))


def job_folder(path: str | Path) -> Path:
    """The folder of a job file, where its relative data paths and `kind: python` targets are looked for."""
    return Path(path).absolute().parent


def resolve_job(job: str | Path | JobConfig, overrides: Sequence[str] = ()) -> tuple[JobConfig, Path]:
    """A job file or a loaded job with overrides applied, and its folder: for a loaded one, the working directory.

    Raises JobError with every problem found.
    """
    if isinstance(job, JobConfig):
        return build_job(job.model_dump(mode="json"), overrides, source=job.name), Path.cwd()
    return load_job(job, overrides), job_folder(job)


def build_job(raw: Any, overrides: Sequence[str] = (), source: str = "job") -> JobConfig:
    """Plain values, as YAML gives them, plus overrides → JobConfig. Raises JobError with every problem found."""
    if not isinstance(raw, dict):
        found = "is empty" if raw is None else f"holds {type(raw).__name__} at its top level"
        raise JobError(
            [Problem(source, None, f"{found}, and a job is a mapping of keys to values", "see jobs/digits.yaml")]
        )
    if "space" in raw and "job" in raw:
        raise JobError([Problem(source, None, "is a space, not a job", f"use it so: temper sweep {source}")])
    problems: list[Problem] = []
    for override in overrides:
        try:
            raw = apply_override(raw, override)
        except JobError as error:
            problems += error.problems
    try:
        job = JobConfig.model_validate(raw)
    except ValidationError as error:
        raise JobError([*problems, *explain(error, raw)]) from None
    if problems:
        raise JobError(problems)
    return job


def apply_override(raw: dict[str, Any], override: str) -> dict[str, Any]:
    """`raw` with one dotted override applied; `raw` itself is left as it is.

    The value is YAML: `optimizer.lr=5e-4`, `data.augment.0.kind=resize`, `model={kind: mlp, hidden: [64]}`,
    `a.b=null`. A section that the file leaves out is made. Raises JobError where the text or the path cannot be.
    """
    key, value = parse_override(override)
    result = replaced(raw, key.split("."), value, key)
    assert isinstance(result, dict), "a job's top level stays a mapping"
    return result


def parse_override(override: str) -> tuple[str, Any]:
    """The key and the value of `key=value`. Raises JobError where the text is none."""
    match = _OVERRIDE.match(override)
    if match is None:
        raise JobError(
            [Problem(printable(override), None, "is not an override", "write key=value, e.g. optimizer.lr=0.1")]
        )
    key = printable(match["key"])
    if not match["value"].strip():
        raise JobError(
            [Problem(key, None, "is given no value", f"write {key}=null for none, or {key}='' for empty text")]
        )
    return key, parse_yaml(match["value"], key)


def replaced(holder: Any, path: Sequence[str], value: Any, key: str) -> Any:
    """A copy of `holder` in which the value at `path` is another; `key` is the whole dotted key, for messages.

    Sections that are missing on the way are made. Raises JobError where there is no such place.
    """
    if not path:
        return value
    name, rest = path[0], path[1:]
    if isinstance(holder, list):
        index = _index(holder, name, key)
        return [*holder[:index], replaced(holder[index], rest, value, key), *holder[index + 1 :]]
    if holder is None and name.isdigit():
        raise JobError(
            [Problem(key, value, f"cannot be set: the job has no list with an entry {name}", "set the whole list")]
        )
    if holder is None:
        holder = {}
    if not isinstance(holder, dict):
        above = ".".join(key.split(".")[: -len(path)])
        raise JobError([Problem(key, value, f"cannot be set: {above} is a single value, not a section")])
    return {**holder, name: replaced(holder.get(name), rest, value, key)}


def _index(holder: list[Any], name: str, key: str) -> int:
    if name.isascii() and name.isdigit() and len(name) < 10 and int(name) < len(holder):
        return int(name)
    rule = f"cannot be set: '{name}' is not an entry of this list of {len(holder)}"
    remedy = f"use 0 to {len(holder) - 1}" if holder else "set the whole list"
    raise JobError([Problem(key, None, rule, remedy)])


def job_to_yaml(job: JobConfig) -> str:
    """The resolved job as YAML, defaults written out, so that it says the same after a default has changed.

    `load_job` of this text gives an equal job.
    """
    return format_yaml(job.model_dump(mode="json"))


def read_text(path: str | Path, what: str) -> str:
    """The text of a file that is to be a job's, or a space's, as `what` says.

    Raises JobError for whatever is not a readable, reasonably small UTF-8 file.
    """
    shown = printable(str(path))
    try:
        file = Path(path)
        if not file.is_file():
            raise JobError([_not_a_file(file, shown, what)])
        with file.open("rb") as stream:
            content = stream.read(MAX_BYTES + 1)
    except (OSError, ValueError) as error:  # ValueError: a NUL in the name
        reason = getattr(error, "strerror", None) or str(error)
        raise JobError([Problem(shown, None, f"cannot be read: {reason}")]) from None
    if len(content) > MAX_BYTES:
        rule = f"is larger than {MAX_BYTES // 1024} KiB, and a {what} file is a few lines"
        raise JobError([Problem(shown, None, rule)])
    try:
        return content.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        rule = f"is not text: byte {error.start} is not UTF-8"
        raise JobError([Problem(shown, None, rule, f"give the {what}'s YAML file, saved as UTF-8")]) from None


def _not_a_file(file: Path, shown: str, what: str) -> Problem:
    if file.is_dir():
        return Problem(shown, None, "is a folder", f"give the {what}'s YAML file")
    if file.exists():
        return Problem(shown, None, "is not a regular file", f"give the {what}'s YAML file")
    folder = file.parent
    near = [entry.name for entry in folder.glob("*.y*ml")] if folder.is_dir() else []
    close = difflib.get_close_matches(file.name, near, n=1, cutoff=0.5)
    remedy = f"did you mean {printable(str(folder / close[0]))}?" if close else f"give the path of a {what}'s YAML file"
    return Problem(shown, None, "does not exist", remedy)


def printable(text: str) -> str:
    """Text that any UTF-8 terminal takes: bytes of an argument that were not UTF-8 are escaped."""
    return text.encode("utf-8", "backslashreplace").decode("utf-8")
