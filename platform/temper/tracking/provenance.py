"""Where a run came from: the state of the git repository and the versions of the packages that decide its numbers."""

from __future__ import annotations

import os
import platform
import subprocess
from dataclasses import asdict, dataclass
from importlib import metadata
from pathlib import Path
from typing import Any

_PACKAGES = (
    "torch", "torchvision", "torchmetrics", "ray", "deepspeed", "mlflow", "pydantic", "numpy", "scikit-learn",
    "pyarrow", "webdataset", "transformers", "safetensors", "optuna", "PyYAML", "rich",
)  # fmt: skip
_LARGEST_DIFF = 2**20
_TIMEOUT_S = 10.0


@dataclass(frozen=True)
class GitState:
    """The state of a repository; `diff` is what differs from the commit, None where nothing does or 1 MiB and more."""

    commit: str
    branch: str
    dirty: bool
    diff: str | None

    def to_dict(self) -> dict[str, Any]:
        """JSON-able, without the text of the diff."""
        return {name: value for name, value in asdict(self).items() if name != "diff"}


def git_state(folder: Path) -> GitState | None:
    """The git state of `folder`, untracked files left out of account; None without git, repository or first commit."""
    commit = _git(folder, "rev-parse", "HEAD")
    if commit is None:
        return None
    branch = _git(folder, "rev-parse", "--abbrev-ref", "HEAD") or ""
    dirty = bool(_git(folder, "status", "--porcelain", "--untracked-files=no"))
    diff = _git(folder, "diff", "HEAD", "--no-ext-diff", "--no-color") if dirty else None
    if diff is not None and len(diff.encode()) >= _LARGEST_DIFF:
        diff = None
    return GitState(commit.strip(), branch.strip(), dirty, diff)


def _git(folder: Path, *arguments: str) -> str | None:
    # Without optional locks `git status` writes nothing, so it cannot get into the way of a git that the user runs.
    environment = {**os.environ, "GIT_OPTIONAL_LOCKS": "0", "GIT_TERMINAL_PROMPT": "0"}
    try:
        done = subprocess.run(
            ["git", "-C", str(folder), *arguments], capture_output=True, env=environment, timeout=_TIMEOUT_S, check=True
        )
    except (OSError, subprocess.SubprocessError):
        return None
    return done.stdout.decode(errors="replace")


def environment_text() -> str:
    """One line each: Python, the operating system and every relevant package that is installed."""
    lines = [f"python=={platform.python_version()}", f"# {platform.platform()}"]
    for package in _PACKAGES:
        try:
            lines.append(f"{package}=={metadata.version(package)}")
        except metadata.PackageNotFoundError:
            continue
    return "\n".join(lines) + "\n"
