"""What composes with what, as a table: made by asking the rules of `checks.py` about every pair of features.

The README's table is `compose_table()`, and the tests train every pair that is legal; both follow the rules.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from temper.config.checks import check_job
from temper.config.schema import JobConfig
from temper.errors import Problem

FEATURES: Mapping[str, Mapping[str, Any]] = {
    "data parallel": {"parallel.workers": 2},
    "ZeRO-1": {"parallel.workers": 2, "parallel.zero": 1},
    "ZeRO-2": {"parallel.workers": 2, "parallel.zero": 2},
    "ZeRO-3": {"parallel.workers": 2, "parallel.zero": 3},
    "offload": {"parallel.offload": "cpu"},
    "pipeline": {"parallel.pipeline": 2},
    "split layers": {"parallel.tensor": 2},
    "image blocks": {"parallel.tensor": 2, "parallel.split": {"layer*": "image_blocks"}},
    "parameter server": {"parallel.mode": "parameter_server", "parallel.workers": 2},
    "bf16": {"precision.dtype": "bf16"},
    "fp16": {"precision.dtype": "fp16"},
    "accumulation": {"parallel.micro_batch": 4},
    "clipping": {"optimizer.clip_norm": 1.0},
    "distillation": {"distill": {"teacher": "teacher.yaml"}},
    "dense-sparse-dense": {"dsd": {"rounds": [{"sparsity": 0.5, "sparse_steps": 2, "redense_steps": 2}]}},
}
"""Each feature and the keys, or the section, that ask for it. `parallel.offload` is asked for with ZeRO-1 where the
other feature brings no stage of its own."""


def compose(*names: str) -> JobConfig | None:
    """A job with all of these features; None where two of them set one key differently, as two ZeRO stages do."""
    values: dict[str, Any] = {}
    for name in names:
        for key, value in FEATURES[name].items():
            if values.setdefault(key, value) != value:
                return None
    if "offload" in names:
        values.setdefault("parallel.zero", 1)
    return _job(values)


def _job(values: Mapping[str, Any]) -> JobConfig:
    sections: dict[str, Any] = {
        "name": "compose",
        "model": {"kind": "resnet", "depth": 8},
        "data": {"kind": "digits", "global_batch": 16},
        "optimizer": {"kind": "sgd", "lr": 0.1},
        "budget": {"steps": 4},
    }
    for key, value in values.items():
        section, _, name = key.partition(".")
        if name:
            sections.setdefault(section, {})[name] = value
        else:
            sections[section] = value
    return JobConfig.model_validate(sections)


def conflict(one: str, other: str) -> Problem | None:
    """The first rule that a job with both features breaks; None where they compose."""
    job = compose(one, other)
    if job is None:
        return Problem(next(iter(FEATURES[other])), other, f"cannot hold beside {one}", "use one of them")
    return next(iter(check_job(job)), None)


def legal_pairs() -> list[tuple[str, str]]:
    """Every pair of features that composes, in the table's order."""
    names = list(FEATURES)
    pairs = [(one, other) for index, one in enumerate(names) for other in names[index + 1 :]]
    return [pair for pair in pairs if conflict(*pair) is None]


def compose_table() -> str:
    """The matrix as Markdown: `✓` composes, `–` is refused before the start."""
    names = list(FEATURES)
    lines = ["| |" + "".join(f" {name} |" for name in names[1:]), "|---|" + ":-:|" * (len(names) - 1)]
    for row, one in enumerate(names[:-1]):
        cells = [" " if column <= row else _cell(one, other) for column, other in enumerate(names)][1:]
        lines.append(f"| {one} |" + "".join(f" {cell} |" for cell in cells))
    return "\n".join(lines)


def _cell(one: str, other: str) -> str:
    return "✓" if conflict(one, other) is None else "–"
