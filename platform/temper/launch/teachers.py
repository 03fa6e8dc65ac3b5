"""Where teachers come from: a job's file, a run, a registered model, a folder, or a network with its weights.

A job that distils is planned here: its teachers are found first, those that are jobs planned in their turn, and then it
is planned with them. Nothing is trained. Of a registered model, and of a run that only MLflow has, the export is
downloaded into the storage, once; mlflow is imported only for these, and torch never.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import re
import shutil
import uuid
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, TypeVar

from temper.config.checks import check_job
from temper.config.load import job_folder as folder_of
from temper.config.load import load_job
from temper.config.schema import DistillConfig, JobConfig, ModelConfig, TeacherConfig
from temper.errors import CheckpointError, JobError, Problem, RunError
from temper.files import read_json
from temper.launch.weights_file import read_weights_file
from temper.plan.build import Plan, build_plan
from temper.plan.distill import Teacher
from temper.plan.facts import data_facts
from temper.plan.mesh import ClusterShape
from temper.plan.targets import (
    Target,
    check_target,
    displaced_file,
    find_module,
    has_own_definition,
    hash_module,
    job_targets,
    local_folders,
)
from temper.products import (
    MODEL,
    Place,
    choose_phase,
    find_run,
    is_checkpoint,
    is_export,
    is_phase,
    open_place,
)
from temper.remote_store import has_phase
from temper.run_folder import JOB, PHASE_MANIFEST, PLAN
from temper.tracking.description import told_phases

Answer = TypeVar("Answer")

_RUN_ID = re.compile(r"[0-9a-f]{32}")
_REGISTERED = re.compile(r"models:/(?P<name>[^/:]+?)(@(?P<alias>[^/:@]+)|/(?P<version>\d+))")


def plan_job(job: JobConfig, cluster: ClusterShape, job_folder: Path, above: tuple[Path, ...] = ()) -> Plan:
    """Decides the run of `job` on `cluster`, and those of its teachers that are jobs themselves.

    `job_folder` is where the job's file lies: data paths, `kind: python` targets and teachers are looked for there,
    too. `above` are the files of the jobs that this one teaches. Raises JobError with every problem found.
    """
    if job.distill is None:
        return build_plan(job, cluster, job_folder)
    configs = _teacher_configs(job.distill)
    problems = _check_ensemble(configs)
    searches = [Search(key, config, job, cluster, job_folder, above) for key, config in configs.items()]
    teachers = []
    for search in searches:
        try:
            teachers.append(find_teacher(search))
        except JobError as error:
            problems += error.problems
    if not problems:
        problems = _check_duplicates(list(configs), teachers)
        problems += _check_modules(list(configs), teachers, job, job_folder)
    if problems:
        raise JobError([*check_job(job), *problems])
    return build_plan(_with_teachers(job, [search.located for search in searches]), cluster, job_folder, teachers)


def _teacher_configs(distill: DistillConfig) -> dict[str, TeacherConfig]:
    """The teachers that are asked for, by their keys."""
    asked = distill.teacher
    if isinstance(asked, list):
        every = {f"distill.teacher.{index}": item for index, item in enumerate(asked)}
    else:
        every = {"distill.teacher": asked}
    return {key: TeacherConfig(source=item) if isinstance(item, str) else item for key, item in every.items()}


def _with_teachers(job: JobConfig, located: Sequence[TeacherConfig]) -> JobConfig:
    """The job with its teachers named so that it can be planned again from its run's folder."""
    assert job.distill is not None, "only a student has teachers"
    asked = job.distill.teacher
    items = asked if isinstance(asked, list) else [asked]
    named = [config.source if isinstance(item, str) else config for item, config in zip(items, located, strict=True)]
    update = {"teacher": named if isinstance(asked, list) else named[0]}
    return job.model_copy(update={"distill": job.distill.model_copy(update=update)})


def _check_ensemble(configs: Mapping[str, TeacherConfig]) -> list[Problem]:
    if not configs:
        return [Problem("distill.teacher", "[]", "names no teacher", "name one, or leave distill out")]
    rule, remedy = "acts in an ensemble only, and there is one teacher", "leave it out"
    alone = configs if len(configs) == 1 else {}
    return [
        Problem(f"{key}.weight", config.weight, rule, remedy) for key, config in alone.items() if config.weight != 1
    ]


def _check_duplicates(keys: Sequence[str], teachers: Sequence[Teacher]) -> list[Problem]:
    first: dict[str, str] = {}
    problems = []
    for key, teacher in zip(keys, teachers, strict=True):
        other = first.setdefault(teacher.fingerprint, key)
        if other != key:
            rule = f"is the same teacher as {other}"
            problems.append(Problem(key, teacher.source, rule, "name it once, with a larger weight"))
    return problems


def _check_modules(keys: Sequence[str], teachers: Sequence[Teacher], job: JobConfig, job_folder: Path) -> list[Problem]:
    """A worker has one module of a name. Refuses a teacher in the place of whose code, or of a helper of its code, a
    worker would import other code: the student's, or another teacher's; and a student with that of a teacher."""
    problems = []
    folders = local_folders(job_folder)
    for key, teacher in zip(keys, teachers, strict=True):
        folders += teacher.import_folders
        if teacher.model.kind == "python":
            own = Path(teacher.import_folders[-1])
            problems += _check_displaced(Target(key, teacher.model.target), teacher.source, own, folders)
    for target in job_targets(job):
        problems += _check_displaced(target, target.value, job_folder, folders)
    return problems


def _check_displaced(target: Target, value: str, own: Path, folders: Sequence[str]) -> list[Problem]:
    displaced = displaced_file(target.module, own, folders)
    if displaced is None:
        return []
    rule = f"is built with {displaced[0]}, in whose place a worker would import {displaced[1]}"
    return [Problem(target.key, value, rule, "rename one of the two")]


# --------------------------------------------------------------------------------------------------------- one teacher


@dataclass(frozen=True)
class Search:
    """For a teacher: as `config` describes it at `key` of the student `job`."""

    key: str
    config: TeacherConfig
    job: JobConfig
    cluster: ClusterShape
    job_folder: Path
    above: tuple[Path, ...] = ()

    @property
    def storage(self) -> Path:
        return self.job.storage_folder

    def problem(self, rule: str, remedy: str = "", key: str = "") -> JobError:
        """At `key` of the teacher's section; by default, at what names the teacher."""
        value = getattr(self.config, key) if key else self.config.source or self.config.weights
        return JobError([Problem(f"{self.key}.{key}" if key else self.key, value, rule, remedy)])

    def candidates(self, name: str) -> list[Path]:
        """Where a path is looked for: in the working directory, then where the student's job lies."""
        named = Path(name).expanduser()
        return [Path.cwd() / named, self.job_folder / named]  # an absolute path stays as it is

    @property
    def located(self) -> TeacherConfig:
        """`config` with the paths that it names made absolute."""
        source, weights = self.config.source, self.config.weights
        is_there = Path.is_file if source is None or _is_job(source) else Path.is_dir
        named = {key: name for key, name in (("source", source), ("weights", weights)) if name is not None}
        update = {
            key: next((str(path.absolute()) for path in self.candidates(name) if is_there(path)), name)
            for key, name in named.items()
        }
        return self.config.model_copy(update=update)

    def folders(self) -> tuple[str, ...]:
        """Where the module of a teacher is looked for that has no job of its own."""
        return tuple(local_folders(self.job_folder))


def find_teacher(search: Search) -> Teacher:
    """The teacher, found or, as a job, planned. Raises JobError where there is none."""
    config = search.config
    if (config.source is None) == (config.model is None and config.weights is None):
        rule = "is to be named by its source or by its model and weights, one of the two"
        raise search.problem(rule, "write a source, or a model with weights")
    if config.source is None:
        return _teacher_of_weights(search)
    if config.source.startswith("models:"):
        return _teacher_of_registry(search)
    if config.source.startswith("runs:/"):
        return _teacher_of_run(search, config.source.removeprefix("runs:/"))
    if _is_job(config.source):
        return _teacher_of_job(search)
    folder = next((path for path in search.candidates(config.source) if path.is_dir()), None)
    return _teacher_of_run(search, config.source) if folder is None else _teacher_of_folder(search, folder.absolute())


def _is_job(source: str) -> bool:
    return Path(source).suffix in (".yaml", ".yml")


def _refuse_phase(search: Search, what: str) -> None:
    if search.config.phase is not None:
        raise search.problem(f"names a phase of a job or a run, and the teacher is {what}", "leave it out", "phase")


# --------------------------------------------------------------------------------------------------------------- a job


def _teacher_of_job(search: Search) -> Teacher:
    """The storage and the store of a teacher's runs are the student's: so it is found by every student there."""
    source, student = str(search.config.source), search.job
    path = _find_file(search, source, "a file")
    if path in search.above:
        chain = " → ".join(item.name for item in (*search.above[search.above.index(path) :], path))
        raise search.problem(f"would be taught by itself: {chain}", "name a teacher that is trained without it")
    try:
        own = load_job(path)
        tracking = own.tracking.model_copy(update={"uri": student.tracking.uri})
        job = own.model_copy(update={"storage": student.storage, "tracking": tracking})
        plan = plan_job(job, search.cluster, folder_of(path), (*search.above, path))
    except JobError as error:
        prefix = f"{search.key}: {source}"
        raise JobError(
            [
                replace(problem, key=prefix if problem.key == str(path) else f"{prefix}: {problem.key}")
                for problem in error.problems
            ]
        ) from None
    fingerprint = _chosen(search, {phase.name: phase.fingerprint for phase in plan.phases}, "job")
    phase = next(phase for phase in plan.phases if phase.fingerprint == fingerprint)
    place = plan.phase_folder(phase)
    return Teacher(
        name=_name(job.name, phase.name, plan.phases[-1].name),
        source=source,
        kind="phase",
        place=place,
        model=job.model,
        fingerprint=fingerprint,
        shape=plan.data.shape,
        num_classes=plan.data.num_classes,
        mean=plan.data.mean,
        std=plan.data.std,
        precision=search.config.precision,
        weight=search.config.weight,
        import_folders=(os.getcwd(), str(folder_of(path))),
        plan=plan,
        is_trained=read_json(place / PHASE_MANIFEST) is not None or has_phase(place),
    )


def _find_file(search: Search, name: str, what: str, key: str = "") -> Path:
    candidates = search.candidates(name)
    for candidate in candidates:
        if candidate.is_file():
            return candidate.resolve()
    looked = " or ".join(str(candidate.absolute()) for candidate in dict.fromkeys(candidates))
    raise search.problem(f"is not {what} (looked for {looked})", "name an existing file", key)


def _chosen(search: Search, phases: dict[str, str], owner: str = "run") -> str:
    """The fingerprint of the phase that is asked for; `owner` is what has the phases."""
    try:
        return choose_phase(phases, search.config.phase, owner)
    except JobError as error:
        raise JobError([replace(problem, key=f"{search.key}.phase") for problem in error.problems]) from None


def _name(job: str, phase: str, last: str) -> str:
    return job if phase == last else f"{job} {phase}"


# ---------------------------------------------------------------------------------------------------- a run, a folder


def _teacher_of_run(search: Search, run_id: str) -> Teacher:
    """First the storage's own runs, then what MLflow knows: the phases that the run names, or its export."""
    folder = find_run(run_id, search.storage)
    if folder is not None:
        return _teacher_of_folder(search, folder.absolute())
    if _RUN_ID.fullmatch(run_id) is None:
        raise search.problem(
            f"is no folder, and no run in {search.storage} has this id",
            "name a job's file, a run, models:/name@alias or a folder",
        )
    from temper.tracking import registry
    from temper.tracking.mlflow_store import tracking_uri

    uri = tracking_uri(search.job)
    tags = _answer(search, lambda: registry.run_tags(uri, run_id))
    if tags is None:
        raise search.problem(f"is no run in {search.storage} or in MLflow", "name another, or set tracking.uri")
    phases = _tagged_phases(tags)
    if not phases:
        raise search.problem("is a run of MLflow that temper did not train", "name a run of temper train")
    fingerprint = _chosen(search, phases)
    phase_folder = search.storage / "phases" / fingerprint
    if (phase_folder / PLAN).is_file():
        return _teacher_of_place(search, _open(search, phase_folder))
    phase = next(name for name, value in phases.items() if value == fingerprint)
    to = search.storage / "teachers" / "models" / f"{run_id}-{fingerprint[:10]}"
    if not _download(search, to, lambda into: registry.download_run_export(uri, run_id, phase, into)):
        rule = f"is a run whose phase {phase} is not in {search.storage}, and which has no export of it in MLflow"
        raise search.problem(rule, "export it where it is, with --register")
    return _teacher_of_export(search, to, f"run {run_id[:8]} {phase}")


def _tagged_phases(tags: dict[str, str]) -> dict[str, str]:
    """Names and fingerprints of a run's phases by its tags; the last one last."""
    return {phase["name"]: phase["fingerprint"] for phase in told_phases(tags)}


def _teacher_of_folder(search: Search, folder: Path) -> Teacher:
    if is_export(folder) and not (folder / PLAN).exists():
        _refuse_phase(search, "an export")
        return _teacher_of_export(search, folder, load_job(folder / JOB).name)
    if is_phase(folder) or is_checkpoint(folder):
        _refuse_phase(search, f"a {'phase' if is_phase(folder) else 'checkpoint'}")
        return _teacher_of_place(search, _open(search, folder))
    return _teacher_of_place(search, _open(search, folder, search.config.phase))


def _open(search: Search, folder: Path, phase: str | None = None) -> Place:
    try:
        return open_place(folder, phase, str(search.config.source))
    except CheckpointError as error:
        raise search.problem(f"cannot be used: {error}", "name another, or the job's file") from None
    except JobError as error:
        is_choice = [problem.key == "--phase" for problem in error.problems]
        keys = [f"{search.key}.phase" if choice else search.key for choice in is_choice]
        raise JobError([replace(problem, key=key) for key, problem in zip(keys, error.problems, strict=True)]) from None


def _teacher_of_place(search: Search, place: Place) -> Teacher:
    """A phase or checkpoint that is there; the data are described by the plan that it was trained by."""
    if not place.is_complete:
        rule = (
            f"is not complete: {place.folder}"
            if place.kind == "checkpoint"
            else f"has not come to the end of {place.phase}"
        )
        raise search.problem(rule, "train it on, or name its job's file, which is trained first")
    last = place.plan["phases"][-1]["name"]
    name = _name(place.job.name, place.phase, last)
    data = place.plan["data"]
    folders = _module_folders(search, place.job.model, place.import_folders or search.folders())
    parts = [place.fingerprint]
    if place.kind == "checkpoint":
        name, parts = f"{name} {place.folder.name}", [*parts, place.folder.name]
    return Teacher(
        name=name,
        source=str(search.config.source),
        kind=place.kind,
        place=place.folder,
        model=place.job.model,
        fingerprint=_fingerprint(parts, place.job.model, folders),
        shape=tuple(data["shape"]),
        num_classes=data["num_classes"],
        mean=tuple(data["mean"]),
        std=tuple(data["std"]),
        precision=search.config.precision,
        weight=search.config.weight,
        import_folders=folders,
    )


# ------------------------------------------------------------------------------------------------ an export, weights


def _teacher_of_registry(search: Search) -> Teacher:
    """A version is downloaded once, and its server then not asked again; an alias has to be resolved every time."""
    _refuse_phase(search, "a registered model")
    match = _REGISTERED.fullmatch(str(search.config.source))
    if match is None:
        raise search.problem("is no registered model", "write models:/name@alias or models:/name/version")
    from temper.tracking import registry
    from temper.tracking.mlflow_store import tracking_uri

    uri, name, version = tracking_uri(search.job), match["name"], match["version"]
    if version is None:
        version = _answer(
            search, lambda: registry.resolve_alias(uri, name, match["alias"]), _versions_here(search, name)
        )
    if version is None:
        raise search.problem(f"is not registered: MLflow has no model {name} with this alias", "name another")
    to = _version_folder(search, uri, name, version)
    if not _download(search, to, lambda into: registry.download_version(uri, name, str(version), into)):
        rule = f"is not registered: MLflow has no model {name} with an export of temper as version {version}"
        raise search.problem(rule, f"register one: temper export RUN --to DIR --register {name}")
    return _teacher_of_export(search, to, f"{name}/{version}")


def _version_folder(search: Search, uri: str, name: str, version: str) -> Path:
    digest = hashlib.sha256(json.dumps([uri, name, version]).encode()).hexdigest()[:10]
    return search.storage / "teachers" / "models" / f"{_file_name(name)}-{version}-{digest}"


def _file_name(name: str) -> str:
    return re.sub(r"[^\w.-]", "_", name)


def _versions_here(search: Search, name: str) -> str:
    """The remedy where no server answers: a version that is in the storage needs none."""
    known = (search.storage / "teachers" / "models").glob(f"{_file_name(name)}-*-*")
    versions = sorted({folder.name.rsplit("-", 2)[1] for folder in known})
    named = " or ".join(f"models:/{name}/{version}" for version in versions)
    return f"start the server, or name a version that is here: {named}" if named else "start the server"


def _download(search: Search, to: Path, download: Callable[[Path], Path | None]) -> bool:
    """Brings an export to the folder `to`, whole or not at all, unless it is there; whether it is."""
    if to.is_dir():
        return True
    unfinished = to.with_name(f".{to.name}.{uuid.uuid4().hex}")  # trials are planned in threads of one process
    unfinished.mkdir(parents=True)
    try:
        found = _answer(search, lambda: download(unfinished))
        if found is None or not is_export(found):
            return False
        with contextlib.suppress(OSError):  # another process was faster
            found.rename(to)
        return True
    finally:
        shutil.rmtree(unfinished, ignore_errors=True)


def _answer(search: Search, ask: Callable[[], Answer], remedy: str = "start the server") -> Answer:
    """What MLflow answers. Raises JobError where it does not."""
    try:
        return ask()
    except RunError as error:
        raise search.problem(f"cannot be looked up: {error}", remedy) from None


def _teacher_of_export(search: Search, folder: Path, name: str) -> Teacher:
    """Of an export only values are taken, wherever it comes from, and never code: a `kind: python` network is built by
    the user's own, and the folder is not searched for modules."""
    job = load_job(folder / JOB)
    _check_code(search, job.model)
    return _teacher_of_file(search, name, folder / MODEL, job.model, search.folders(), **_known(job, folder))


def _check_code(search: Search, model: ModelConfig) -> None:
    """Refuses the target of an export's network unless it is the user's own code: defined in the working directory or
    where the student's job lies, and in neither an export nor the storage."""
    if model.kind != "python":
        return
    target = Target(search.key, model.target)
    file = find_module(target.module, search.job_folder) if has_own_definition(target, search.job_folder) else None
    fetched = search.storage.absolute()
    if file is None or any(is_export(folder) or folder == fetched for folder in file.absolute().parents):
        rule = f"is built by code that it names itself: `{model.target}`"
        raise search.problem(rule, "write model: and weights: in this job")


def _known(job: JobConfig, folder: Path) -> dict[str, Any]:
    """What an export says of its data; where they are not on this machine, the normalisation that its job sets."""
    try:
        facts = data_facts(job.data, folder, taught=job.distill is not None)
    except JobError:
        normalize = job.data.normalize
        return {} if normalize is None else {"mean": tuple(normalize.mean), "std": tuple(normalize.std)}
    return {"shape": facts.shape, "num_classes": facts.num_classes, "mean": facts.mean, "std": facts.std}


def _teacher_of_weights(search: Search) -> Teacher:
    _refuse_phase(search, "a network with its weights")
    config = search.config
    if config.model is None:
        raise search.problem("are the weights of a network that is not named", "write its model, too", "weights")
    if config.weights is None:
        raise search.problem("has a model and no weights", "name a safetensors file as weights")
    file = _find_file(search, config.weights, "a file", "weights")
    return _teacher_of_file(search, file.stem, file, config.model, search.folders())


def _teacher_of_file(
    search: Search, name: str, file: Path, model: ModelConfig, folders: Sequence[str], **known: Any
) -> Teacher:
    try:
        weights = read_weights_file(file)
    except CheckpointError as error:
        key = "weights" if search.config.source is None else ""
        raise search.problem(
            f"cannot be used: {error}", "save the weights with safetensors.torch.save_file", key
        ) from None
    folders = _module_folders(search, model, folders)
    parts = [weights.content, json.dumps(model.model_dump(mode="json"), sort_keys=True)]
    return Teacher(
        name=name,
        source=str(search.config.source or search.config.weights),
        kind="weights",
        place=file,
        model=model,
        fingerprint=_fingerprint(parts, model, folders),
        precision=search.config.precision,
        weight=search.config.weight,
        import_folders=folders,
        weight_shapes=weights.shapes,
        **known,
    )


# ------------------------------------------------------------------------------------------------------- its own code


def _module_folders(search: Search, model: ModelConfig, folders: Sequence[str]) -> tuple[str, ...]:
    """`folders`, of which the last one has the module of a `kind: python` network. Raises JobError where none has."""
    if model.kind != "python":
        return tuple(folders)
    target = Target(search.key, model.target)
    problems = {folder: check_target(target, Path(folder)) for folder in reversed(folders)}
    having = next((folder for folder, problem in problems.items() if problem is None), None)
    if having is None:
        raise JobError([problem for problem in problems.values() if problem is not None][:1])
    return (*(folder for folder in folders if folder != having), having)


def _fingerprint(parts: Sequence[str], model: ModelConfig, folders: Sequence[str]) -> str:
    """Over `parts` and, of a `kind: python` network, the code that builds it today: found weights may be older."""
    if model.kind == "python":
        parts = [*parts, hash_module(model.target.split(":")[0], Path(folders[-1]))]
    return parts[0] if len(parts) == 1 else hashlib.sha256(json.dumps(parts).encode()).hexdigest()
