"""Code that a job names by `kind: python, target: module:function`: where it lies and a hash of it, found without
running it.

The hash is an ingredient of a phase's fingerprint: a phase computed by other code is another phase. It covers the
target's module, or its whole package, and whatever those import from the working directory or the job's folder.
"""

from __future__ import annotations

import ast
import hashlib
import importlib.util
import os
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from importlib.machinery import ModuleSpec, PathFinder
from pathlib import Path

from temper.config.schema import JobConfig
from temper.errors import Problem


@dataclass(frozen=True)
class Target:
    """One `target` of a job, at its dotted `key`."""

    key: str
    value: str

    @property
    def module(self) -> str:
        return self.value.split(":")[0]

    @property
    def function(self) -> str:
        return self.value.split(":")[1]


def job_targets(job: JobConfig) -> list[Target]:
    """Every target that the job names."""
    sections = (("model", job.model), ("data", job.data), ("loss", job.loss))
    return [Target(f"{key}.target", section.target) for key, section in sections if section.kind == "python"]


def check_targets(job: JobConfig, job_folder: Path) -> list[Problem]:
    """What is wrong with the job's targets; see :func:`check_target`."""
    return [problem for target in job_targets(job) if (problem := check_target(target, job_folder)) is not None]


def check_target(target: Target, job_folder: Path) -> Problem | None:
    """What is wrong with a target: its file cannot be found, cannot be parsed, or does not name the function."""
    file = find_module(target.module, job_folder)
    if file is None:
        folders = f"neither on Python's path nor in the working directory or {job_folder}"
        rule = f"names the module {target.module}, which is found {folders}"
        return Problem(target.key, target.value, rule, "put the module's file there, or correct the name")
    if file.suffix != ".py":
        return None
    try:
        tree = ast.parse(file.read_bytes())
    except (SyntaxError, ValueError, RecursionError) as error:
        return Problem(target.key, target.value, f"is in {file}, which is not valid Python: {error}")
    except OSError as error:
        return Problem(target.key, target.value, f"is in {file}, which cannot be read: {error.strerror}")
    names = _top_level_names(tree)
    if target.function in names or "*" in names:
        return None
    functions = [node.name for node in tree.body if isinstance(node, ast.FunctionDef | ast.ClassDef)]
    remedy = f"it has {', '.join(functions[:8])}" if functions else ""
    return Problem(target.key, target.value, f"names {target.function}, which {file} does not define", remedy)


def _top_level_names(tree: ast.Module) -> set[str]:
    """Names that the module binds anywhere but inside functions and classes; "*" where it imports all of another."""
    names: set[str] = set()
    for node in _outer_nodes(tree):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef):
            names.add(node.name)
        elif isinstance(node, ast.Import | ast.ImportFrom):
            names |= {alias.asname or alias.name.split(".")[0] for alias in node.names}
        elif isinstance(node, ast.Name) and isinstance(node.ctx, ast.Store):
            names.add(node.id)
    if "__getattr__" in names:
        names.add("*")
    return names


def _outer_nodes(node: ast.AST) -> Iterator[ast.AST]:
    for child in ast.iter_child_nodes(node):
        yield child
        if not isinstance(child, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef | ast.Lambda):
            yield from _outer_nodes(child)


def find_module(module: str, job_folder: Path) -> Path | None:
    """The file of `module`, looked for on Python's path, then in the working directory and `job_folder`; imports
    nothing.

    The order is that of :mod:`temper.targets`, which loads it.
    """
    top, *parts = module.split(".")
    spec = _find_top(top, local_folders(job_folder))
    for part in parts:
        if spec is None:
            return None
        spec = PathFinder.find_spec(part, list(spec.submodule_search_locations or ()))
    return Path(spec.origin) if spec is not None and spec.has_location and spec.origin else None


def _find_top(name: str, folders: Sequence[str]) -> ModuleSpec | None:
    spec = PathFinder.find_spec(name, [*sys.path, *folders])
    if spec is not None:
        return spec
    try:
        return importlib.util.find_spec(name)  # a package installed as editable is found by a hook only
    except (ImportError, ValueError):
        return None


def local_folders(job_folder: Path) -> list[str]:
    """Where a job's own code lies, in the order in which it is looked for."""
    return list(dict.fromkeys([os.getcwd(), str(job_folder.absolute())]))


def has_own_definition(target: Target, job_folder: Path) -> bool:
    """Whether a file in the working directory or `job_folder`, and not on Python's path, defines the target's function
    itself: one that it only imports is not its own."""
    file = find_module(target.module, job_folder)
    places = [Path(folder, *target.module.split(".")) for folder in local_folders(job_folder)]
    own = {path.resolve() for place in places for path in (place.with_name(f"{place.name}.py"), place / "__init__.py")}
    if file is None or file.resolve() not in own:
        return False
    try:
        tree = ast.parse(file.read_bytes())
    except (SyntaxError, ValueError, RecursionError, OSError):
        return False
    functions = [node.name for node in tree.body if isinstance(node, ast.FunctionDef | ast.ClassDef)]
    return target.function in functions


def displaced_file(module: str, job_folder: Path, folders: Sequence[str]) -> tuple[Path, Path] | None:
    """A file of the code of `module`, as a job in `job_folder` finds it, in whose place another is imported where
    `folders` are searched, in their order: the two. None where there is none."""
    files = _source_files(module.split(".")[0], local_folders(job_folder))
    imported = {top: _files_of(top, folders) for top in {_top_of(name) for name in files}}
    for name, file in sorted(files.items()):
        root, found = imported[_top_of(name)]
        if root is None:
            continue
        other = found.get(name)
        if other is None:
            return file, root / _top_of(name)
        if other != file and other.read_bytes() != file.read_bytes():
            return file, other
    return None


def _top_of(name: str) -> str:
    """The top-level module or package that a file of :func:`_source_files` belongs to."""
    return name.split("/")[0].split(".")[0]


def hash_targets(job: JobConfig, job_folder: Path) -> dict[str, str]:
    """SHA-256 of the source behind each target of a job that :func:`check_targets` finds nothing wrong with, by key."""
    return {target.key: hash_module(target.module, job_folder) for target in job_targets(job)}


def hash_module(module: str, job_folder: Path) -> str:
    """SHA-256 over names and contents of the files that `module` comes from."""
    digest = hashlib.sha256()
    for name, file in sorted(_source_files(module.split(".")[0], local_folders(job_folder)).items()):
        digest.update(name.encode() + b"\0" + hashlib.sha256(file.read_bytes()).digest())
    return digest.hexdigest()


def _source_files(top: str, folders: Sequence[str]) -> dict[str, Path]:
    """Files of the top-level module or package `top` and of those in `folders` that it imports, by a name free of
    folders."""
    local = {Path(folder).resolve() for folder in folders}
    files: dict[str, Path] = {}
    waiting, seen = [top], {top}
    while waiting:
        name = waiting.pop()
        root, found = _files_of(name, folders)
        files |= found
        if root not in local:
            continue  # an installed package; it is not followed into its own dependencies
        imported = {other for file in found.values() for other in _imports(file)}
        fresh = {other for other in imported - seen if _root_of(_find_top(other, folders)) in local}
        seen |= fresh
        waiting += sorted(fresh)
    return files


def _files_of(top: str, folders: Sequence[str]) -> tuple[Path | None, dict[str, Path]]:
    """The folder that holds the top-level module or package, and its files; (None, {}) where it has none."""
    spec = _find_top(top, folders)
    root = _root_of(spec)
    if spec is None or root is None:
        return None, {}
    if spec.submodule_search_locations is None:
        return root, {Path(str(spec.origin)).name: Path(str(spec.origin))}
    # Of the portions of a package without an __init__.py, the first one that has a module is asked for it.
    portions = [Path(portion) for portion in reversed(list(spec.submodule_search_locations))]
    return root, {
        f"{top}/{file.relative_to(portion).as_posix()}": file for portion in portions for file in portion.rglob("*.py")
    }


def _root_of(spec: ModuleSpec | None) -> Path | None:
    """The folder that holds a module's file or a package's folder."""
    if spec is None:
        return None
    if spec.submodule_search_locations is not None:
        return next((Path(portion).resolve().parent for portion in spec.submodule_search_locations), None)
    return Path(spec.origin).resolve().parent if spec.has_location and spec.origin is not None else None


def _imports(file: Path) -> set[str]:
    """Top-level names of what a file imports absolutely; relative ones stay in the package, which is hashed whole."""
    try:
        tree = ast.parse(file.read_bytes())
    except (SyntaxError, ValueError, RecursionError, OSError):
        return set()
    names: set[str] = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            names |= {alias.name.split(".")[0] for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.level == 0 and node.module:
            names.add(node.module.split(".")[0])
    return names
