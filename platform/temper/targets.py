"""Loads the function that a `module:function` target names: the one place where a job's text leads to code.

A module is looked for on Python's own path first and in the working directory and the job's folder last, so that a
file of the user's never takes the place of an installed library.
"""

from __future__ import annotations

import importlib
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from temper.errors import JobError, Problem


def apply_target_folders(folders: Sequence[Path]) -> None:
    """Make modules in `folders` importable in this process, behind everything that already is."""
    for folder in (str(folder.absolute()) for folder in folders):
        if folder not in sys.path:
            sys.path.append(folder)


def forget_modules(folders: Sequence[Path]) -> None:
    """Forget the modules that were imported from `folders`: the next import reads their files anew, wherever a module
    of that name lies then."""
    importlib.invalidate_caches()
    for name, module in list(sys.modules.items()):
        file = getattr(module, "__file__", None)
        inside = Path(*name.split("."))
        places = [
            folder.absolute() / ending for folder in folders for ending in (f"{inside}.py", inside / "__init__.py")
        ]
        if file is not None and name.split(".")[0] != "temper" and Path(file) in places:
            del sys.modules[name]


def load_target(target: str, key: str) -> Callable[..., Any]:
    """Import `module:function` and return the function; the working directory is searched, too.

    Raises JobError with a problem on `key` where the module or the function is missing or the import fails.
    """
    module_name, _, function_name = target.partition(":")
    apply_target_folders([Path.cwd()])
    try:
        module = importlib.import_module(module_name)
    except Exception as error:
        # A module of the user's may fail in any way while it is imported; each is the user's to mend.
        raise JobError([_import_problem(target, key, module_name, error)]) from error
    function = getattr(module, function_name, None)
    if not callable(function):
        found = "does not exist" if function is None else "is not a function"
        remedy = f"define `{function_name}` in {getattr(module, '__file__', module_name)}"
        raise JobError([Problem(key, target, f"`{function_name}` {found} in module `{module_name}`", remedy)])
    result: Callable[..., Any] = function
    return result


def _import_problem(target: str, key: str, module_name: str, error: Exception) -> Problem:
    missing = error.name if isinstance(error, ModuleNotFoundError) else None
    if missing and (module_name == missing or module_name.startswith(f"{missing}.")):
        remedy = "put it in the working directory or next to the job file, or install it"
        return Problem(key, target, f"module `{missing}` is not found", remedy)
    return Problem(key, target, f"importing `{module_name}` raised {type(error).__name__}: {error}", "mend the module")
