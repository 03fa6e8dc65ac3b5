"""`temper.results` and the report on a sweep of many trials, each with three phases, from a SQLite store.

    python benchmarks/report.py [--trials 1000] [--folder FOLDER] [--out docs/report]

The runs are made up (`tests/sweep_tree.py`); a `--folder` that has them already is used again. Each of the two is timed
in a process of its own, from its start to its end, imports included:

    results   temper.results(), and how long that took without the imports
    report    the page with plotly.js in it, and its figures as PNG files

The last line is JSON; `--out` writes it to a file, too.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parent.parent
sys.path.insert(0, str(ROOT / "tests"))

from sweep_tree import MadeSweep, write_sweep  # noqa: E402

MOST_S, MOST_MB = 10.0, 8.0

RESULTS = """
import sys, time
import temper
began = time.perf_counter()
frame = temper.results(storage=sys.argv[1])
print(*frame.shape, time.perf_counter() - began)
"""
REPORT = """
import sys
from pathlib import Path
from temper.tracking.report import save, sweep_report
folder = Path(sys.argv[1])
print(save(sweep_report(f"sqlite:///{folder}/mlflow.db", sys.argv[2], folder), folder / "report.html"))
"""


def made_sweep(trials: int) -> MadeSweep:
    """Ten temperatures × ten sparsities, with as many seeds as give this many trials."""
    temperatures, sparsities = [2.0**power for power in range(10)], [0.45 + step / 20 for step in range(10)]
    return MadeSweep(temperatures, sparsities, range(max(1, trials // 100)), "many_trials")


def timed(code: str, *arguments: str) -> tuple[list[str], float]:
    """What a new process prints, and its seconds."""
    began = time.perf_counter()
    done = subprocess.run(
        [sys.executable, "-c", code, *arguments], cwd=ROOT, capture_output=True, text=True, check=True
    )
    return done.stdout.split(), time.perf_counter() - began


def measure(folder: Path, sweep: MadeSweep) -> dict[str, Any]:
    if not (folder / "mlflow.db").exists():
        write_sweep(folder / "mlflow.db", sweep)
    (rows, columns, reading_s), results_s = timed(RESULTS, str(folder))
    (page,), report_s = timed(REPORT, str(folder), sweep.id)
    return {
        "trials": len(sweep.trials()),
        "rows": int(rows),
        "columns": int(columns),
        "results_s": results_s,
        "reading_s": float(reading_s),
        "report_s": report_s,
        "page_mb": Path(page).stat().st_size / 1e6,
        "database_mb": (folder / "mlflow.db").stat().st_size / 1e6,
    }


def print_table(found: dict[str, Any]) -> None:
    print(f"{found['trials']:,} trials with three phases each, a database of {found['database_mb']:,.0f} MB")
    print(f"temper.results  {found['results_s']:6.1f} s, of them {found['reading_s']:.1f} s after the imports")
    for name, unit, most in (("report_s", "s", MOST_S), ("page_mb", "MB", MOST_MB)):
        verdict = "within" if found[name] <= most else "NOT within"
        print(f"{name.partition('_')[0]:14}  {found[name]:6.1f} {unit}, {verdict} {most:g} {unit}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--trials", type=int, default=1000, help="in hundreds")
    parser.add_argument("--folder", type=Path, help="storage for the runs; default: a temporary one")
    parser.add_argument("--out", type=Path, help="file for the JSON, without suffix")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as temporary:
        folder = (options.folder or Path(temporary)).absolute()
        folder.mkdir(parents=True, exist_ok=True)
        found = measure(folder, made_sweep(options.trials))
    print_table(found)
    if options.out:
        options.out.with_suffix(".json").write_text(json.dumps(found, indent=2) + "\n")
    print(json.dumps(found))


if __name__ == "__main__":
    main()
