"""Job files and overrides → JobConfig: what is read, and what is said about what is wrong."""

import json
import os
import types
from pathlib import Path
from typing import Annotated, Union, get_args, get_origin

import pytest
from pydantic import BaseModel

from temper.config.checks import check_job, has_random_augment
from temper.config.load import apply_override, build_job, job_to_yaml, load_job
from temper.config.schema import JobConfig, json_schema
from temper.config.text import MAX_BYTES, parse_yaml
from temper.errors import EXIT_WRONG_JOB, JobError

JOBS = Path(__file__).parent.parent / "jobs"
BASE = {
    "name": "job",
    "model": {"kind": "cnn"},
    "data": {"kind": "digits", "global_batch": 64},
    "optimizer": {"kind": "sgd", "lr": 0.1},
    "budget": {"steps": 100},
}

TAUGHT = "distill={teacher: teacher.yaml}"
PAIRS = "distill.features=auto"
FLIP = "data.augment=[{kind: resize, size: 8}, {kind: random_horizontal_flip}]"
RESIZE = "data.augment=[{kind: resize, size: 8}]"
ROWS = "{kind: python, global_batch: 64, target: a:b, train_examples: 64, test_examples: 8, shape: [9, 4]}"
CTC = ["loss={kind: ctc}", f"data={ROWS}"]


def problems_of(*overrides, raw=None):
    """`key: value rule; remedy` of every problem, by key."""
    with pytest.raises(JobError) as caught:
        build_job(BASE if raw is None else raw, overrides)
    assert caught.value.exit_code == EXIT_WRONG_JOB
    return {problem.key: str(problem) for problem in caught.value.problems}


def broken_rules(*overrides):
    return {problem.key: str(problem) for problem in check_job(build_job(BASE, overrides))}


def write(folder, text):
    file = folder / "job.yaml"
    file.write_bytes(text.encode() if isinstance(text, str) else text)
    return file


# ------------------------------------------------------------------------------------------------------------- YAML


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("5e-4", 0.0005),
        ("1e3", 1000.0),
        ("-.5", -0.5),
        ("1.", 1.0),
        ("0777", 777),
        ("0o17", 15),
        ("0x1F", 31),
        ("no", "no"),
        ("1:30", "1:30"),
        ("1_000", "1_000"),
        ("2020-01-01", "2020-01-01"),
        ("true", True),
        ("~", None),
        ("'5e-4'", "5e-4"),
        ("[1, 2.5, {a: b}]", [1, 2.5, {"a": "b"}]),
        ("&x [1]", [1]),
        ("{a: &x [1], b: *x}", {"a": [1], "b": [1]}),
    ],
)
def test_plain_values_follow_yaml_1_2(text, value):
    parsed = parse_yaml(text, "text")
    assert parsed == value
    assert type(parsed) is type(value)


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("a: 1\nb: 2\na: 3\n", "a: is written twice, in lines 1 and 3"),
        ("a:\n  b: 1\n  b: 2\n", "a.b: is written twice, in lines 2 and 3"),
        ("a: [1, 2\nb: 3\n", "text: is not valid YAML: line 2, column 2"),
        ("a:\n\tb: 1\n", "indent with spaces"),
        ("a: .nan", "a: .nan must be a finite number"),
        ("a: 1e999", "a: 1e999 must be a finite number"),
        ("a: " + "9" * 5000, "a: is an integer of more than 40 digits"),
        ("a: !!python/object:os.system x", "a: has the tag !!python/object:os.system"),
        ("a: !!binary aGk=", "a: has the tag !!binary"),
        ("a: !!int x", "a: is not a value of the type !!int"),
        ("1: a", "1: is not a key"),
        ("? [a]\n: b", "is not a key"),
        ('a: "\\ud800"', "a: holds a character"),
        ('a: "\\UFFFFFFFF"', "text: has an escape that is not a character"),
        ("a: \0", "text: is not valid YAML"),
        ("[" * 3000, "text: "),
        ("&a [*a]", "text: is nested more than"),
        ("a: &a {b: *a}", "text: is nested more than"),
        ("a: 1\n---\nb: 2\n", "text: is not valid YAML"),
    ],
)
def test_what_a_job_cannot_hold_is_said_where_it_stands(text, said):
    with pytest.raises(JobError) as caught:
        parse_yaml(text, "text")
    assert said in str(caught.value)


def test_aliases_cannot_blow_a_small_file_up():
    lines = ["a0: &a0 [x, x, x, x, x, x, x, x, x, x]"]
    lines += [f"a{i}: &a{i} [{', '.join([f'*a{i - 1}'] * 10)}]" for i in range(1, 10)]
    with pytest.raises(JobError, match="once its aliases are expanded"):
        parse_yaml("\n".join(lines), "text")


def test_a_syntax_error_is_one_problem():
    with pytest.raises(JobError) as caught:
        parse_yaml("a: {\nb: }\nc: [\n", "job.yaml")
    assert len(caught.value.problems) == 1


# ------------------------------------------------------------------------------------------------------------ files


def test_a_job_file_is_read(tmp_path):
    job = load_job(write(tmp_path, json.dumps(BASE)), ["optimizer.lr=5e-4"])
    assert isinstance(job, JobConfig)
    assert job.optimizer.lr == 0.0005
    assert job.precision.dtype == "fp32"


@pytest.mark.parametrize(
    ("content", "said"),
    [
        ("", "is empty"),
        ("# only a comment\n", "is empty"),
        ("- a\n- b\n", "holds list at its top level"),
        ("text", "holds str at its top level"),
        (b"\xff\xfe\x00", "is not text: byte 0 is not UTF-8"),
        (b"x" * (MAX_BYTES + 1), "is larger than 256 KiB"),
    ],
)
def test_what_is_not_a_job_file_is_refused(tmp_path, content, said):
    with pytest.raises(JobError, match=said):
        load_job(write(tmp_path, content))


def test_a_missing_file_names_its_neighbour(tmp_path):
    write(tmp_path, "a: 1")
    with pytest.raises(JobError, match=r"does not exist; did you mean .*job\.yaml"):
        load_job(tmp_path / "jobs.yaml")


@pytest.mark.parametrize("name", ["", "no/such/folder/job.yaml", "a\0b", "x" * 5000, "\udcff.yaml"])
def test_an_impossible_path_is_a_problem(tmp_path, monkeypatch, name):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(JobError) as caught:
        load_job(name)
    str(caught.value).encode()


def test_folders_and_pipes_are_refused_without_waiting(tmp_path):
    with pytest.raises(JobError, match="is a folder"):
        load_job(tmp_path)
    os.mkfifo(tmp_path / "pipe")
    with pytest.raises(JobError, match="is not a regular file"):
        load_job(tmp_path / "pipe")


# --------------------------------------------------------------------------------------------------------- overrides


@pytest.mark.parametrize(
    ("override", "path", "value"),
    [
        ("optimizer.lr=1e-3", ("optimizer", "lr"), 0.001),
        ("precision.dtype=bf16", ("precision", "dtype"), "bf16"),
        ("optimizer.clip_norm=null", ("optimizer", "clip_norm"), None),
        ("model={kind: mlp, hidden: [8]}", ("model", "hidden"), [8]),
        ("data.augment=[{kind: random_erasing}]", ("data", "augment", 0, "p"), 0.5),
        ("storage=a=b", ("storage",), "a=b"),
    ],
)
def test_an_override_sets_one_value(override, path, value):
    found = build_job(BASE, [override]).model_dump()
    for key in path:
        found = found[key]
    assert found == value


def test_an_override_reaches_into_lists():
    raw = {**BASE, "data": {**BASE["data"], "augment": [{"kind": "random_erasing"}, {"kind": "random_erasing"}]}}
    job = build_job(raw, ["data.augment.1.p=0.25"])
    assert [transform.p for transform in job.data.augment] == [0.5, 0.25]


def test_overrides_leave_the_given_values_alone():
    before = json.dumps(BASE)
    build_job(BASE, ["optimizer.lr=9", "data.global_batch=8"])
    assert json.dumps(BASE) == before


def test_of_two_overrides_the_later_wins():
    assert build_job(BASE, ["seed=1", "seed=2"]).seed == 2


@pytest.mark.parametrize(
    ("override", "key", "said"),
    [
        ("seed", "seed", "is not an override"),
        ("=1", "=1", "is not an override"),
        ("a..b=1", "a..b=1", "is not an override"),
        ("seed=", "seed", "is given no value"),
        ("seed={", "seed", "is not valid YAML"),
        ("seed.x.y=1", "seed", "must be an integer, not a mapping"),
        ("name.x=1", "name.x", "name is a single value"),
        ("data.augment.0.kind=resize", "data.augment.0.kind", "has no list"),
        ("optimzer.lr=1", "optimzer", "did you mean 'optimizer'?"),
        ("optimizer.lrr=1", "optimizer.lrr", "did you mean 'lr'?"),
    ],
)
def test_a_wrong_override_is_a_problem_of_its_key(override, key, said):
    assert said in problems_of(override)[key]


def test_a_list_index_out_of_range_says_the_range():
    raw = {**BASE, "data": {**BASE["data"], "augment": [{"kind": "random_erasing"}]}}
    assert "use 0 to 0" in problems_of("data.augment.1.p=1", raw=raw)["data.augment.1.p"]


# ------------------------------------------------------------------------------------------------------ the messages


@pytest.mark.parametrize(
    ("override", "line"),
    [
        ("budget.steps='two'", "budget.steps: two must be an integer, not text"),
        ("budget.steps='2'", "budget.steps: 2 must be an integer, not text; leave the quotes out"),
        ("budget.steps=10.0", "budget.steps: 10.0 must be an integer, not a fraction; use 10"),
        ("budget.steps=0", "budget.steps: 0 must be greater than 0"),
        ("seed=null", "seed: must be an integer, not null"),
        ("optimizer.momentm=0.9", "optimizer.momentm: 0.9 is not a key of optimizer; did you mean 'momentum'?"),
        ("lr=3", "lr: 3 is not a key of a job; did you mean 'optimizer.lr'?"),
        (
            "optimizer.eps=1",
            "optimizer.eps: 1 is not a key of optimizer of kind sgd; leave it out, or choose another kind",
        ),
        ("model.kind=cnm", "model.kind: cnm is not a kind of model; did you mean 'cnn'?"),
        (
            "optimizer.kind=lion8",
            "optimizer.kind: lion8 is not a kind of optimizer; use one of sgd, adam, adamw, adagrad",
        ),
        (
            "precision.dtype=fp61",
            "precision.dtype: fp61 must be one of 'fp32', 'tf32', 'bf16' or 'fp16'; did you mean 'fp16'?",
        ),
        (
            "evaluation.metrics=[accurcy]",
            "evaluation.metrics.0: accurcy must be one of 'accuracy', 'top5_accuracy', 'f1', 'precision', 'recall', "
            "'auroc', 'calibration_error', 'mse' or 'mae'; did you mean 'accuracy'?",
        ),
        ("model.channels=[]", "model.channels: [] must be of at least 1 entry"),
        ("model.channels=[1, x]", "model.channels.1: x must be an integer, not text"),
        ("optimizer.schedule.milestones=[2]", "optimizer.schedule.milestones.0: 2 must be less than 1"),
        ("data.augment=[{kind: resize, size: 0}]", "data.augment.0.size: 0 must be greater than 0"),
        ("parallel=3", "parallel: 3 must be a section of keys and values, not an integer"),
        (
            "loss={kind: python, target: nets}",
            "loss.target: nets must be 'module:function', e.g. my_package.nets:build",
        ),
        ("storage=''", "storage: '' must be text that is not empty"),
        ("parallel.workers=true", "parallel.workers: true must be an integer, not true or false"),
        ("name=[true, {a: null}]", "name: [true, {'a': null}] must be text, not a list"),
        (
            "distill={}",
            "distill.teacher: is missing; add it: the teacher, by its `source` or in full, or several as an ensemble",
        ),
    ],
)
def test_a_problem_names_key_value_rule_and_remedy(override, line):
    assert problems_of(override) == {line.split(":")[0]: line}


def test_zero_is_a_number_and_not_true():
    assert "parallel.zero" in problems_of("parallel.zero=true")


def test_all_problems_are_reported_at_once():
    keys = ["optimizer.lr", "optimizer.momentm", "precision.dtype", "data.global_batch", "seed", "foo"]
    found = problems_of(*(f"{key}=[x]" for key in keys), "broken")
    assert set(found) == {*keys, "broken"}


def test_missing_keys_are_named_with_what_they_may_be():
    found = problems_of(raw={"name": "x", "optimizer": {"kind": "sgd"}, "data": {"knd": "digits"}})
    assert set(found) == {"model", "data.kind", "optimizer.lr", "budget"}
    assert "kind: one of torchvision, resnet, mlp" in found["model"]
    assert "'knd' is perhaps meant for it" in found["data.kind"]


# -------------------------------------------------------------------------------- values that may be of several forms

TEACHER = [
    ("{sorce: t.yaml}", ".sorce: t.yaml is not a key of {path}; did you mean 'source'?"),
    ("{source: t.yaml, precision: fp8}", ".precision: fp8 must be one of 'fp32', 'bf16' or 'fp16'"),
    ("{source: t.yaml, weight: 0}", ".weight: 0 must be greater than 0"),
    ("{source: [t.yaml]}", ".source: ['t.yaml'] must be text, not a list"),
    ("{model: {kind: mpl}, weights: x}", ".model.kind: mpl is not a kind of model; did you mean 'mlp'?"),
    ("{model: {knd: mlp}}", ".model.kind: is missing; 'knd' is perhaps meant for it; use one of torchvision, resnet, "),
    ("{model: {kind: python}, weights: x}", ".model.target: is missing; add it: `module:function`, importable from "),
    ("{model: {kind: mlp, hidden: [8, 0]}}", ".model.hidden.1: 0 must be greater than 0"),
    (
        "{model: {kind: cnn, width: 3}}",
        ".model.width: 3 is not a key of {path}.model of kind cnn; leave it out, or choose another kind",
    ),
    ("''", ": '' must be text that is not empty"),
]
RAMP = [
    ("{start: 8}", ".end: is missing; add it"),
    ("{end: 1}", ".start: is missing; add it"),
    ("{start: 1, end: 0, kind: cosin}", ".kind: cosin must be one of 'linear' or 'cosine'; did you mean 'cosine'?"),
    ("{start: 1, end: 0, knd: cosine}", ".knd: cosine is not a key of {path}; did you mean 'kind'?"),
    ("{start: 1, end: a}", ".end: a must be a number, not text"),
    ("{start: 1, end: -1}", ".end: -1 must be at least 0"),
    ("true", ": true must be a number or a section of keys and values, not true or false"),
    ("'4'", ": 4 must be a number or a section of keys and values, not text; leave the quotes out"),
    ("[4]", ": [4] must be a number or a section of keys and values, not a list"),
    ("null", ": must be a number or a section of keys and values, not null"),
]
# What is wrong, by the path of the union: a value, and what is said after the path.
WRONG = {
    "distill.teacher": [*TEACHER, ("3", ": 3 must be text or a section of keys and values or a list, not an integer")],
    "distill.teacher.*": [*TEACHER, ("[a]", ": ['a'] must be text or a section of keys and values, not a list")],
    "distill.temperature": [*RAMP, ("0", ": 0 must be greater than 0")],
    "distill.alpha": [*RAMP, ("2", ": 2 must be at most 1")],
    "distill.features": [
        ("[{}]", ".0.student: is missing; add it: dotted name of a module of the student"),
        ("[{student: a, teecher: b}]", ".0.teecher: b is not a key of {path}.0; did you mean 'teacher'?"),
        ("[{student: a}, {student: b, of: x}]", ".1.of: x must be an integer, not text"),
        ("[{student: a, weight: 0}]", ".0.weight: 0 must be greater than 0"),
        ("[a]", ".0: a must be a section of keys and values, not text"),
        ("atuo", ": atuo must be 'auto' or a list, not text; did you mean 'auto'?"),
        ("{student: a}", ": {'student': 'a'} must be 'auto' or a list, not a mapping"),
    ],
    "dsd.rounds.*.sparsity": [
        ("2", ": 2 must be less than 1"),
        ("{a: 2}", ".a: 2 must be less than 1"),
        ("{a: x}", ".a: x must be a number, not text"),
        ("[0.5]", ": [0.5] must be a number or a mapping of keys to values, not a list"),
    ],
    "precision.loss_scale": [
        ("0", ": 0 must be greater than 0"),
        ("dynamc", ": dynamc must be 'dynamic' or a number, not text; did you mean 'dynamic'?"),
        ("'5'", ": 5 must be 'dynamic' or a number, not text; leave the quotes out"),
    ],
    "parallel.stages": [
        ("[2, 0]", ".1: 0 must be greater than 0"),
        ("[x]", ".0: x must be an integer, not text"),
        ("mesured", ": mesured must be one of 'derived' or 'measured' or a list, not text; did you mean 'measured'?"),
    ],
}
SHAPELESS = [
    "null",
    "true",
    "-1",
    "0",
    "1.5",
    "''",
    "text",
    "[]",
    "[null]",
    "[[]]",
    "[{}]",
    "{}",
    "{kind: x, model: {}}",
]
FORMS = {**BASE, "distill": {"teacher": ["a"]}, "dsd": {"rounds": [{}]}}


def members_of(annotation):
    """The types of a union, or the one type that it is."""
    if get_origin(annotation) is Annotated:
        return members_of(get_args(annotation)[0])
    if get_origin(annotation) in (Union, types.UnionType):
        return [member for argument in get_args(annotation) for member in members_of(argument)]
    return [] if annotation is types.NoneType else [annotation]


def mixed_unions(annotation=JobConfig, path=()):
    """The paths at which values of several forms may stand that no `kind` tells apart; * is an entry of a list."""
    members = members_of(annotation)
    sections = [member for member in members if isinstance(member, type) and issubclass(member, BaseModel)]
    found = {".".join(path)} if len(members) - len(sections) > 0 and len(members) > 1 else set()
    for section in sections:
        for name, field in section.model_fields.items():
            found |= mixed_unions(field.annotation, (*path, name))
    for member in members:
        if get_origin(member) in (list, dict):
            found |= mixed_unions(get_args(member)[-1], (*path, "*"))
    return found


def test_every_union_of_the_schema_is_tried():
    assert mixed_unions() == set(WRONG)


@pytest.mark.parametrize(
    ("path", "value", "said"), [(path, value, said) for path, cases in WRONG.items() for value, said in cases]
)
def test_one_mistake_inside_a_union_is_one_problem_at_its_own_key(path, value, said):
    key = path.replace("*", "0")
    line = key + said.replace("{path}", key)
    ((found, text),) = problems_of(f"{key}={value}", raw=FORMS).items()
    assert found == line.split(":")[0]
    assert text == line or (line.endswith((" ", ",")) and text.startswith(line))


@pytest.mark.parametrize("value", SHAPELESS)
@pytest.mark.parametrize("path", sorted(WRONG))
def test_what_is_said_of_a_union_holds_nothing_of_pydantics(path, value):
    raw = apply_override(FORMS, f"{path.replace('*', '0')}={value}")
    try:
        build_job(raw)
    except JobError as error:
        for problem in error.problems:
            assert not any(word in str(problem) for word in ("Config", "constrained", "literal", "union", "list["))
            holder = raw
            for name in problem.key.split(".")[:-1]:
                holder = holder[int(name)] if isinstance(holder, list) else holder[name]


# ------------------------------------------------------------------------------------------------ rules across sections


def test_a_right_job_breaks_no_rule():
    assert broken_rules() == {}
    assert broken_rules("precision={dtype: fp16, initial_scale: 1024}", "parallel={workers: 2, zero: 2}") == {}


@pytest.mark.parametrize(
    ("overrides", "key", "said"),
    [
        (["budget={}"], "budget", "give one of them"),
        (["budget.epochs=2"], "budget.epochs", "beside budget.steps: 100"),
        (
            ["parallel={workers: 6}"],
            "data.global_batch",
            "64 cannot be split evenly over parallel.workers: 6; use 60 or 66",
        ),
        (["parallel={workers: 6}"], "data.global_batch", "or workers: 4"),
        (["data.global_batch=3", "parallel.workers=4"], "data.global_batch", "use 4, or workers: 3"),
        (["parallel={pipeline: 2, zero: 2}"], "parallel.zero", "use zero: 1"),
        (["parallel={stages: [2]}"], "parallel.stages", "leave it out or use pipeline: 2"),
        (["parallel={pipeline: 3, stages: [2]}"], "parallel.stages", "name 2 or use pipeline: 2"),
        (["parallel={pipeline: 3, stages: [4, 2]}"], "parallel.stages", "use [2, 4]"),
        (["parallel={tensor: 2, zero: 3, split: {x: image_blocks}}"], "parallel.zero", "use zero: 2"),
        (["parallel={split: {fc: output_activations}}"], "parallel.split", "leave it out or use tensor: 2"),
        (["parallel={shards: 2}"], "parallel.shards", "use mode: parameter_server"),
        (["parallel={mode: parameter_server, zero: 1}"], "parallel.zero", "use zero: 0 or mode: synchronous"),
        (["parallel={mode: parameter_server, micro_batch: 4}"], "parallel.micro_batch", "use micro_batch: null"),
        (
            ["parallel={mode: parameter_server}", "data.loader_processes=2"],
            "data.loader_processes",
            "use loader_processes: 0",
        ),
        (["parallel={mode: parameter_server, tensor: 2}"], "parallel.tensor", "use tensor: 1"),
        (["parallel.mode=parameter_server", "precision.dtype=fp16"], "precision.dtype", "use bf16, fp32"),
        (["precision={master_weights: false}"], "precision.master_weights", "use dtype: bf16"),
        (["precision={dtype: fp16, at_min_scale: back_off}"], "precision.at_min_scale", "set budget.checkpoint_every"),
        (["precision={dtype: bf16, at_min_scale: hold}"], "precision.at_min_scale", "use dtype: fp16"),
        (
            ["precision={dtype: fp16, underflow_every: 5}", "parallel.pipeline=2"],
            "precision.underflow_every",
            "use pipeline: 1",
        ),
        (["parallel.offload=cpu"], "parallel.offload", "use zero: 1 or offload: none"),
        (["optimizer.nesterov=true"], "optimizer.nesterov", "set momentum: 0.9"),
        (["optimizer.schedule.warmup_steps=100"], "optimizer.schedule.warmup_steps", "use at most 99"),
        (["optimizer.schedule.kind=step"], "optimizer.schedule.milestones", "use e.g. [0.5, 0.75]"),
        (["optimizer.schedule.milestones=[0.5]"], "optimizer.schedule.milestones", "no effect with kind: constant"),
        (
            ["optimizer.schedule={kind: step, milestones: [0.7, 0.5, 0.7]}"],
            "optimizer.schedule.milestones",
            "must rise; use [0.5, 0.7]",
        ),
        (["optimizer.schedule.gamma=0.5"], "optimizer.schedule.gamma", "use kind: step"),
        (["optimizer.schedule.final_factor=0.5"], "optimizer.schedule.final_factor", "use kind: cosine or linear"),
        (["precision.loss_scale=128"], "precision.loss_scale", "use dtype: fp16"),
        (["precision={dtype: bf16, scale_window: 5}"], "precision.scale_window", "acts on fp16 only"),
        (["precision={dtype: fp16, initial_scale: 1000}"], "precision.initial_scale", "use 1024"),
        (["precision={dtype: fp16, initial_scale: 1e300}"], "precision.initial_scale", "use 4294967296"),
        (["precision={dtype: fp16, initial_scale: 4, min_scale: 8}"], "precision.min_scale", "use at most 4"),
        (["precision={dtype: fp16, min_scale: 0.5}"], "precision.min_scale", "use 1"),
        (["precision={dtype: fp16, loss_scale: 128, hysteresis: 5}"], "precision.hysteresis", "a dynamic scale only"),
        (["loss={kind: mse}"], "evaluation.metrics.0", "use some of mse, mae"),
        (["evaluation.metrics=[accuracy, mse]"], "evaluation.metrics.1", "does not fit loss.kind: cross_entropy"),
        (["evaluation.metrics=[f1, f1]"], "evaluation.metrics.1", "is listed twice"),
        (
            ["evaluation.metrics=[top5_accuracy]", "data={kind: synthetic, global_batch: 64, num_classes: 4}"],
            "evaluation.metrics.0",
            "needs at least 5",
        ),
        (
            ["data.augment=[{kind: random_erasing}, {kind: center_crop, size: 6}]"],
            "data.augment.1",
            "move random_erasing to the end",
        ),
        (["data.omit_classes=[3, 1, 3]"], "data.omit_classes", "names a class twice; use [1, 3]"),
        (
            [*CTC, "evaluation.metrics=[accuracy]"],
            "evaluation.metrics.0",
            "does not fit loss.kind: ctc; use metrics: []",
        ),
        (["loss={kind: ctc}"], "loss.kind", "data of kind digits have one label; use data of kind python"),
        ([TAUGHT, "loss={kind: mse}", "evaluation.metrics=[mse]"], "loss.kind", "has no classes"),
        ([TAUGHT, *CTC, "distill.loss=decoupled"], "distill.loss", "the class of every frame"),
        ([TAUGHT, "data.labels=0.1", "distill.loss=decoupled"], "distill.loss", "data.labels is 0.1; use loss: soft"),
        ([TAUGHT, "data.labels=0"], "distill.alpha", "0.9 gives weight to labels, and data.labels: 0 leaves none"),
        ([TAUGHT, "data.labels=0", "distill.alpha={start: 0, end: 1}"], "distill.alpha", "use alpha: 1"),
        (
            [TAUGHT, "data.labels=0.5", "loss={kind: python, target: a:b}"],
            "loss.kind",
            "is not told which examples have no label, and data.labels is 0.5",
        ),
        ([TAUGHT, "distill.non_target_weight=2"], "distill.non_target_weight", "use loss: decoupled"),
        ([TAUGHT, "distill.temperature={start: 4, end: 4}"], "distill.temperature", "use temperature: 4"),
        ([TAUGHT, "distill.temperature={start: 0, end: 4}"], "distill.temperature.start", "must be more than 0"),
        ([TAUGHT, "distill.alpha={start: 0.5, end: 1.5}"], "distill.alpha.end", "1.5 must be at most 1; use 1"),
        ([TAUGHT, "distill.alpha=0"], "distill.alpha", "teaches nothing without features"),
        ([TAUGHT, PAIRS, "distill.alpha=0", "distill.temperature=2"], "distill.temperature", "distill.alpha is 0"),
        ([TAUGHT, PAIRS, "distill.alpha=0", "distill.standardize=true"], "distill.standardize", "use alpha: 0.9"),
        ([TAUGHT, "distill.feature_loss=gram"], "distill.feature_loss", "acts on features only"),
        (
            [TAUGHT, "distill.features=[{student: a, weight: 2}]", "distill.feature_weight=3"],
            "distill.feature_weight",
            "every pair has its own weight",
        ),
        ([TAUGHT, "distill.views=4"], "distill.views", "data.augment has none; leave it out"),
        ([TAUGHT, "distill.views=4", RESIZE], "distill.views", "acts on random augmentation only"),
        ([TAUGHT, "distill.top_k=5"], "distill.top_k", "leave it out or use cache: logits"),
        ([TAUGHT, "distill.cache=logits", FLIP], "distill.cache", "set views: 4 or use cache: none"),
        ([TAUGHT, "distill.cache=features"], "distill.cache", "has no features to hold; use cache: logits"),
        ([TAUGHT, PAIRS, "distill.cache=logits"], "distill.cache", "lacks the features that are taught"),
        (
            [TAUGHT, "distill={cache: logits, placement: sharded, teacher: a}"],
            "distill.placement",
            "acts on a live teacher only, and distill.cache is logits",
        ),
        ([TAUGHT, "distill.teacher_batch=33", "parallel.workers=2"], "distill.teacher_batch", "use at most 32"),
        (
            [TAUGHT, "parallel.mode=parameter_server", "distill.features=auto"],
            "distill.features",
            "a parameter server holds the parameters of the model alone",
        ),
        (
            [TAUGHT, "parallel.mode=parameter_server", "distill.placement=sharded"],
            "distill.placement",
            "joins ranks in step",
        ),
    ],
)
def test_a_broken_rule_names_the_nearest_legal_setting(overrides, key, said):
    assert said in broken_rules(*overrides)[key]


@pytest.mark.parametrize(
    "overrides",
    [
        ["budget.checkpoint_every=1000"],
        ["parallel.micro_batch=1000"],
        ["data.augment=[{kind: resize, size: 10}, {kind: random_crop, size: 8}]"],
        ["loss={kind: mse}", "evaluation.metrics=[mae]"],
        ["loss={kind: python, target: a:b}", "evaluation.metrics=[mse, accuracy]"],
        [*CTC, "evaluation.metrics=[]"],
        ["data.labels=0.1", "data.omit_classes=[3]"],
        [TAUGHT, "data.labels=0", "distill.alpha=1", "loss={kind: cross_entropy, label_smoothing: 0.1}"],
        [TAUGHT, "data.labels=0.03"],
        [TAUGHT, "distill={teacher: [a, b], temperature: {start: 10, end: 2}, alpha: {start: 0, end: 1}}"],
        [TAUGHT, "distill={teacher: a, loss: decoupled, non_target_weight: 2, standardize: true}"],
        [TAUGHT, PAIRS, "distill.alpha=0", "distill.cache=features", "distill.feature_loss=gram"],
        [TAUGHT, "distill.features=[{student: a, weight: 2}, {student: b}]", "distill.feature_weight=3"],
        [TAUGHT, FLIP],
        [TAUGHT, FLIP, "distill={teacher: a, cache: logits, views: 4, top_k: 3, teacher_batch: 256}"],
        [TAUGHT, RESIZE, "distill.cache=logits"],
        [TAUGHT, "distill.placement=sharded", "distill.teacher_batch=64"],
    ],
)
def test_what_only_looks_odd_is_allowed(overrides):
    assert broken_rules(*overrides) == {}


# ------------------------------------------------------------------------------------------------- back to text, schema


def test_a_resolved_job_reads_back_equal(tmp_path):
    overrides = ["name='1e3'", "storage='no'", "optimizer.lr=1e-10", "data.augment=[{kind: resize, size: 4}]"]
    job = build_job(BASE, overrides)
    text = job_to_yaml(job)
    assert load_job(write(tmp_path, text)) == job
    assert "momentum: 0.0" in text


def test_the_schema_file_for_editors_is_fresh():
    kept = json.loads((JOBS / "job.schema.json").read_text())
    assert kept == json_schema(), "run: python -m temper.config.schema > jobs/job.schema.json"


@pytest.mark.parametrize("file", sorted(JOBS.glob("*.yaml")), ids=lambda file: file.stem)
def test_a_shipped_job_is_right_and_known_to_editors(file):
    assert check_job(load_job(file)) == []
    assert file.read_text().startswith("# yaml-language-server: $schema=job.schema.json\n")


def test_what_makes_an_example_look_different_each_time():
    for augment, random in ((FLIP, True), (RESIZE, False), ("data.augment=[]", False)):
        assert has_random_augment(build_job(BASE, [augment]).data) is random
