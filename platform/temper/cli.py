"""The command line: reads arguments, calls one function of launch/ or export, prints its result, gives the exit code.

Everything meant for people goes to standard error; with `--json` the last line of standard output is one JSON object.
Heavy modules are imported by the command that needs them, so that `temper plan` starts without torch and Ray.
"""

from __future__ import annotations

import argparse
import json
import shlex
import shutil
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import temper
from temper import __version__
from temper.errors import EXIT_DONE, EXIT_FAILED, EXIT_INTERRUPTED, EXIT_WRONG_JOB, JobError, Problem, TemperError
from temper.plan.metric_names import without_classes
from temper.storage import open_storage, storage_folder

if TYPE_CHECKING:
    from temper.launch.teacher_runs import TeacherResult
    from temper.launch.train import PhaseResult

DESCRIPTION = "temper trains networks well and cheaply on a Ray cluster."
PHASES = "what is computed already: list, show and compare phases, and make room"


def main(argv: Sequence[str] | None = None) -> int:
    """Runs one command and returns its exit code: 0 done, 1 failed, 2 wrong job or command line, 130 interrupted."""
    arguments = list(sys.argv[1:] if argv is None else argv)
    try:
        options = _parse(arguments)
    except SystemExit as end:
        return int(end.code or 0)
    try:
        return int(options.run(options) or EXIT_DONE)
    except JobError as error:
        return _refuse(error, options)
    except TemperError as error:
        _say(f"temper {options.command}: {error}")
        status = "interrupted" if error.exit_code == EXIT_INTERRUPTED else "failed"
        _print_json(options, {"status": status, "error": str(error)})
        return error.exit_code
    except KeyboardInterrupt:
        _say(f"temper {options.command}: interrupted")
        _print_json(options, {"status": "interrupted", "error": "stopped at once"})
        return EXIT_INTERRUPTED


def _refuse(error: JobError, options: argparse.Namespace) -> int:
    count = len(error.problems)
    _say(f"temper {options.command}: {count} problem{'s' if count != 1 else ''}")
    for problem in error.problems:
        _say(f"  {problem}")
    _print_json(options, {"status": "refused", "problems": [str(problem) for problem in error.problems]})
    return EXIT_WRONG_JOB


def _say(text: str) -> None:
    print(text, file=sys.stderr, flush=True)


def _print_json(options: argparse.Namespace, value: Any) -> None:
    if getattr(options, "json", False):
        print(json.dumps(value, default=str), flush=True)


# ------------------------------------------------------------------------------------------------------- commands


def _plan(options: argparse.Namespace) -> None:
    from temper.plan.show import plan_table

    plan = temper.plan(options.job, options.overrides)
    _say(plan_table(plan))
    _print_json(options, plan.to_dict())


def _train(options: argparse.Namespace) -> None:
    from temper.config.load import resolve_job
    from temper.launch.cluster import check_address

    check_address(options.address)
    job, folder = resolve_job(options.job, options.overrides)
    from temper.launch.train import TrainOptions, launch_train

    how = TrainOptions(options.address, options.fresh, _display_mode(options), _typed("train", options))
    result = launch_train(job, folder, how)
    reused = " (every phase reused; --fresh trains again)" if result.status == "reused" else ""
    _say(f"{job.name}: done in {result.seconds:.1f} s{reused}")
    for teacher in result.teachers:
        _say(_teacher_line(teacher))
    for name, value in sorted(without_classes(result.teacher_metrics).items()):
        _say(f"  {f'teacher/{name}':<24} {value:.4f}")
    if len(result.phases) > 1:
        for phase in result.phases:
            _say(_phase_line(phase))
    for name, value in sorted(without_classes(result.metrics).items()):
        if name.startswith(("eval/", "test/")):
            _say(f"  {name:<24} {value:.4f}")
    _say(f"  checkpoint               {result.checkpoint}")
    if result.registered:
        _say(
            "  registered               "
            + "; ".join(filter(None, (result.registered["uri"], result.registered["note"])))
        )
    where = f"--uri {job.tracking.uri}" if job.tracking.uri else f"--storage {job.storage}"
    run_id = result.run_id or "not there yet, the same command delivers it"
    _say(f"  MLflow run               {run_id}; look at it with: {_program()} ui {where}")
    _print_json(options, result.to_dict())


def _phase_line(phase: PhaseResult) -> str:
    took = "reused" if phase.reused else f"{phase.seconds:.1f} s"
    return "  ".join([f"  {phase.name:<12}{phase.steps:>8} steps{took:>11}", *_tests(phase.metrics)])


def _teacher_line(teacher: TeacherResult) -> str:
    made = "reused" if teacher.reused else "trained first"
    return "  ".join([f"  teacher {teacher.name}, {made}", *_tests(teacher.metrics)])


def _tests(metrics: Mapping[str, float]) -> list[str]:
    shown = sorted(without_classes(metrics).items())
    return [f"{name} {value:.4f}" for name, value in shown if name.startswith("test/")]


def _sweep(options: argparse.Namespace) -> None:
    from temper.config.space_load import load_space
    from temper.launch.cluster import check_address
    from temper.launch.sweep.driver import launch_sweep
    from temper.launch.sweep.planning import preview_sweep
    from temper.launch.train import TrainOptions

    check_address(options.address)
    space, overrides = load_space(options.job, options.overrides)
    typed = _typed("sweep", options)
    how = TrainOptions(options.address, options.fresh, _display_mode(options), typed)
    if options.dry_run:
        preview = preview_sweep(space, Path(options.job), overrides, options.address)
        for name, value in preview.items():
            _say(f"{name:<14} {', '.join(map(str, value)) if isinstance(value, list) else value}")
        _print_json(options, preview)
        return
    result = launch_sweep(space, Path(options.job), overrides, how)
    for line in result.summary:
        _say(line)
    _print_json(options, result.to_dict())


def _verify(options: argparse.Namespace) -> int:
    from temper.config.load import resolve_job
    from temper.launch.cluster import check_address

    check_address(options.address)
    job, folder = resolve_job(options.job, options.overrides)
    from temper.launch.verify import launch_verify

    typed = _typed("verify", options)
    done = launch_verify(job, folder, steps=options.steps, address=options.address, command=typed, say=_say)
    for comparison in done.comparisons:
        for step in comparison.steps[1:]:
            worst = ", ".join(f"{what} {error:.1e} ({name})" for what, (name, error) in step.worst.items())
            where = f"{comparison.dtype} {comparison.phase} step {step.step}"
            _say(f"  {where}: loss {step.loss:.6f}; largest errors: {worst}")
    _say(f"{job.name}: {'equal to one process' if done.difference is None else 'DIFFERS: ' + done.difference}")
    if done.run_id:
        _say(f"  certificate in MLflow run {done.run_id}")
    _print_json(options, {"status": "equal" if done.difference is None else "differs", **done.to_dict()})
    return EXIT_DONE if done.difference is None else EXIT_FAILED


def _eval(options: argparse.Namespace) -> None:
    from temper.export import evaluate_product, find_product

    product = find_product(options.reference, open_storage(options.storage), options.phase)
    metrics = evaluate_product(product)
    for name, value in sorted(without_classes(metrics).items()):
        _say(f"{name:<24} {value:.4f}")
    _print_json(options, {"checkpoint": str(product.checkpoint), "metrics": metrics})


def _export(options: argparse.Namespace) -> None:
    from temper.export import export_product, find_product

    if options.alias and options.register is None:
        raise JobError([Problem("--alias", options.alias, "is a name for a registered version", "add --register NAME")])
    if options.register is not None:
        from temper.tracking.registry import check_name

        check_name(options.register, options.alias)
    product = find_product(options.reference, open_storage(options.storage), options.phase)
    if options.register and not product.run:
        rule = f"needs the MLflow run of {options.reference}, and no run in its storage says which that is"
        raise JobError([Problem("--register", options.register, rule, "train the job again: it is tracked then")])
    result = export_product(product, Path(options.to))
    pruned = f", {result['pruned']:,} of them pruned" if result["pruned"] else ""
    _say(f"{result['parameters']:,} parameters in {result['folder']}/model.safetensors{pruned}")
    if options.register:
        from temper.launch.champion import CHAMPION
        from temper.launch.registering import register_product

        registered = register_product(product, Path(options.to), options.register, options.alias or CHAMPION)
        result |= {"registered": registered.uri, "alias": registered.alias, "note": registered.note}
        also = f", and as models:/{options.register}@{registered.alias}" if registered.alias else ""
        _say(f"registered as {registered.uri}{also}")
        if registered.note:
            _say(f"  {registered.note}")
    _print_json(options, result)


def _phases_list(options: argparse.Namespace) -> None:
    from temper.launch.phases.show import list_phases, phases_table

    listed = list_phases(open_storage(options.storage))
    _say(phases_table(listed, time.time()))
    _print_json(options, listed)


def _phases_show(options: argparse.Namespace) -> None:
    from temper.launch.phases.show import phase_text, show_phase

    shown = show_phase(options.phase, open_storage(options.storage))
    _say(phase_text(shown))
    _print_json(options, shown)


def _phases_diff(options: argparse.Namespace) -> None:
    from temper.launch.phases.diff import comparison_text, diff_phases

    comparison = diff_phases(options.a, options.b, options.overrides, open_storage(options.storage))
    _say(comparison_text(comparison))
    _print_json(options, comparison.to_dict())


def _phases_prune(options: argparse.Namespace) -> None:
    from temper.launch.phases.prune import PruneOptions, prune_phases, prune_text
    from temper.launch.phases.units import parse_age, parse_size

    criteria = PruneOptions(
        older_than_s=None if options.older_than is None else parse_age("--older-than", options.older_than),
        larger_than=None if options.larger_than is None else parse_size("--larger-than", options.larger_than),
        keep=None if options.keep is None else parse_size("--keep", options.keep),
        unreachable=options.unreachable,
        dry_run=options.dry_run,
    )
    now_s = time.time()
    result = prune_phases(open_storage(options.storage), criteria, now_s)
    _say(prune_text(result, now_s))
    _print_json(options, result.to_dict())


def _report(options: argparse.Namespace) -> None:
    from temper.tracking.mlflow_store import storage_uri
    from temper.tracking.report import run_report, save, sweep_report, upload
    from temper.tracking.report.run_data import read_run
    from temper.tracking.report.subject import find_subject

    _check_uri(options)
    storage = open_storage(options.storage)
    subject = find_subject(options.reference, storage, storage_uri(storage, options.uri))
    if subject.folder is None:
        report = sweep_report(subject.uri, subject.run_id, subject.storage)
    else:
        report = run_report(read_run(subject.folder))
    path = save(report, Path(options.to) if options.to else subject.page)
    is_logged = bool(subject.run_id) and upload(report, subject.uri, subject.run_id)
    _say(f"report in {path}" + (f", and in MLflow run {subject.run_id}" if is_logged else ""))
    _print_json(options, {"file": str(path), "run_id": subject.run_id, "logged": is_logged})


def _ui(options: argparse.Namespace) -> int:
    from temper.tracking.mlflow_store import storage_uri
    from temper.tracking.ui import serve_ui

    _check_uri(options)
    uri = storage_uri(open_storage(options.storage), options.uri)
    return serve_ui(uri, port=options.port, open_browser=not options.no_browser)


def _check_uri(options: argparse.Namespace) -> None:
    """Raises JobError where --uri is no address that MLflow tracks to."""
    from temper.plan.checks import check_tracking_uri

    problems = check_tracking_uri(options.uri, "") if options.uri is not None else []
    if problems:
        raise JobError([replace(problem, key="--uri") for problem in problems])


def _doctor(options: argparse.Namespace) -> int:
    from temper.launch.doctor import examine, show_findings

    findings = examine(storage_folder(options.storage))
    _say(show_findings(findings))
    _print_json(options, {"findings": [finding.to_dict() for finding in findings]})
    return int(any(finding.level == "fault" for finding in findings))


def _display_mode(options: argparse.Namespace) -> Any:
    return "live" if sys.stderr.isatty() and not options.json else "plain"


def _program() -> str:
    """How this program is called here: `temper`, or its path where the shell does not find it."""
    return "temper" if shutil.which("temper") or not sys.argv[0].endswith("temper") else sys.argv[0]


def _typed(command: str, options: argparse.Namespace) -> str:
    """The command that repeats this run."""
    return shlex.join(["temper", command, options.job, *options.overrides])


# --------------------------------------------------------------------------------------------------------- parser


def _parse(arguments: list[str]) -> argparse.Namespace:
    """Options of one command. Exits with code 2 for what is none."""
    parser = _parser()
    options, rest = parser.parse_known_args(arguments)
    # argparse takes a list of positionals up to the first flag only: `train JOB --json key=value` leaves the rest.
    if rest and (not hasattr(options, "overrides") or any(text.startswith("-") for text in rest)):
        parser.error(f"unrecognized arguments: {' '.join(rest)}")
    if rest:
        options.overrides += rest
    return options


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="temper", description=DESCRIPTION)
    parser.add_argument("--version", action="version", version=f"temper {__version__}")
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    _add_job_command(commands, "plan", _plan, "what will happen, and what it costs")
    train = _add_job_command(commands, "train", _train, "train a job; reuses what is finished, resumes what was broken")
    sweep = _add_job_command(
        commands, "sweep", _sweep, "run many trials of a job; goes on with a sweep that was broken"
    )
    verify = _add_job_command(
        commands, "verify", _verify, "prove that this topology computes what one process computes"
    )
    verify.add_argument("--steps", type=_positive, default=3, help="optimizer steps that are compared (default: 3)")
    for command in (train, sweep, verify):
        command.add_argument("--address", default="local", help="local (an embedded Ray), auto, HOST:PORT or ray://…")
    train.add_argument("--fresh", action="store_true", help="forget what was computed for this job and train it again")
    sweep.add_argument("--dry-run", action="store_true", help="say what would be done, and start nothing")
    sweep.add_argument("--fresh", action="store_true", help="begin the sweep anew; phases are reused all the same")
    evaluate = _add_command(commands, "eval", _eval, "evaluate a run or checkpoint on its job's test split")
    export = _add_command(commands, "export", _export, "write a run's model for plain PyTorch")
    for command in (evaluate, export):
        command.add_argument("reference", metavar="RUN|CHECKPOINT", help="MLflow run id, or a folder")
        command.add_argument("--phase", help="a phase of the run; default: the last")
    export.add_argument("--to", required=True, metavar="DIR", help="folder for model.safetensors, job.yaml, README.md")
    export.add_argument("--register", metavar="NAME", help="also make it a version of this model in MLflow's registry")
    export.add_argument(
        "--alias", help="with --register: give the version this alias; default: champion, if it is better than that"
    )
    report = _add_command(commands, "report", _report, "write a page on a run or a sweep, with its figures")
    report.add_argument("reference", metavar="RUN|SWEEP", help="MLflow run id, or a folder")
    report.add_argument("--to", metavar="FILE", help="HTML file; default: report.html in the run's or sweep's folder")
    report.add_argument("--uri", help="as of ui: of a sweep whose folder is not in the storage")
    phases = commands.add_parser("phases", help=PHASES, description=PHASES)
    _add_phases_commands(phases.add_subparsers(dest="action", required=True, metavar="ACTION"))
    ui = _add_command(commands, "ui", _ui, "open MLflow on the runs")
    ui.add_argument("--uri", help="a job's tracking.uri; default: MLFLOW_TRACKING_URI, else the storage's database")
    ui.add_argument("--port", type=_port, default=5000)
    ui.add_argument("--no-browser", action="store_true", help="only serve")
    doctor = _add_command(commands, "doctor", _doctor, "check this machine and name each fault with its remedy")
    for command in (evaluate, export, report, ui, doctor):
        command.add_argument("--storage", default="./runs", help="folder or bucket of the runs (default: ./runs)")
    return parser


def _add_phases_commands(actions: Any) -> None:
    listing = _add_command(actions, "list", _phases_list, "what is in the phase store, and teachers' caches")
    show = _add_command(actions, "show", _phases_show, "one phase, what it was made of, and who needs it")
    show.add_argument("phase", metavar="PHASE", help="the beginning of its fingerprint")
    diff = _add_command(actions, "diff", _phases_diff, "why one phase was computed again: where two of them differ")
    diff.add_argument("a", metavar="PHASE", help="the beginning of its fingerprint")
    diff.add_argument("b", metavar="PHASE|JOB", help="another phase, or a job's file, as it would be planned now")
    diff.add_argument("overrides", nargs="*", default=[], metavar="key=value", help="of the job")
    criteria = "--older-than, --larger-than, --keep, --unreachable; --dry-run"
    prune = _add_command(actions, "prune", _phases_prune, f"make room, but of nothing that is in use: {criteria}")
    prune.add_argument("--older-than", metavar="AGE", help="those not used for so long, e.g. 7d or 12h")
    prune.add_argument("--larger-than", metavar="SIZE", help="those larger than this, e.g. 1.5G")
    prune.add_argument("--keep", metavar="SIZE", help="those used longest ago, until all are at most so large")
    prune.add_argument("--unreachable", action="store_true", help="those of no run or trial, and unfinished ones")
    prune.add_argument("--dry-run", action="store_true", help="only show what would be removed")
    for command in (listing, show, diff, prune):
        command.add_argument("--storage", default="./runs", help="folder or bucket of the runs (default: ./runs)")


def _positive(text: str) -> int:
    number = int(text)
    if number < 1:
        raise argparse.ArgumentTypeError(f"{number} is not a positive number")
    return number


def _port(text: str) -> int:
    number = int(text) if text.isdecimal() else -1
    if not 0 <= number < 2**16:
        raise argparse.ArgumentTypeError(f"{text} is no port: 0 to 65535")
    return number


def _add_command(
    commands: Any, name: str, run: Callable[[argparse.Namespace], int | None], help: str
) -> argparse.ArgumentParser:
    parser: argparse.ArgumentParser = commands.add_parser(name, help=help, description=help)
    parser.add_argument("--json", action="store_true", help="print the result as one JSON line on standard output")
    parser.set_defaults(run=run)
    return parser


def _add_job_command(
    commands: Any, name: str, run: Callable[[argparse.Namespace], int | None], help: str
) -> argparse.ArgumentParser:
    parser = _add_command(commands, name, run, help)
    what = (
        ("SPACE", "a space file, e.g. tune_spaces/dsd.yaml")
        if name == "sweep"
        else ("JOB", "a job file, e.g. jobs/digits.yaml")
    )
    parser.add_argument("job", metavar=what[0], help=what[1])
    parser.add_argument("overrides", nargs="*", default=[], metavar="key=value", help="e.g. parallel.workers=4")
    return parser
