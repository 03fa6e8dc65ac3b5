"""The cache of what a teacher says: what is read is what it said, nothing is asked twice, nothing wrong is reused."""

from __future__ import annotations

import itertools
import json
import multiprocessing
import pickle
from collections.abc import Callable
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor

from distributed import run_distributed
from temper.config.schema import JobConfig, MLPModel, PythonModel
from temper.data.augment import build_transforms
from temper.data.batches import eval_batches, view_batch
from temper.data.sources import SplitName, load_splits
from temper.errors import JobError, RunError
from temper.launch import teacher_cache
from temper.launch.teacher_cache import make_cache
from temper.models.build import build_model
from temper.plan import probe
from temper.plan.build import Plan, build_plan
from temper.plan.distill import CachePlan, Connector, DistillPlan, FeaturePair, Teacher
from temper.plan.facts import data_facts
from temper.plan.mesh import ClusterShape
from temper.plan.probe import ModelFacts
from temper.techniques.distill import cache_files
from temper.techniques.distill.cache import CachedSignals, keep_largest, left_mass, restore, write_piece
from temper.techniques.distill.cache_files import (
    TEMPERATURES,
    Cut,
    Part,
    Piece,
    complete_cache,
    damaged_parts,
    map_columns,
    missing_pieces,
    plan_cut,
    remove_damaged,
)
from temper.techniques.distill.signals import Signals
from temper.techniques.distill.teacher import build_teacher

CLASSES, TRAIN_ROWS, TEST_ROWS, VIEWS, PASS_ROWS = 7, 50, 11, 3, 4
CUTS = [Cut("train", TRAIN_ROWS, VIEWS, part_rows=24, piece_rows=8), Cut("test", TEST_ROWS, 1, 24, 8)]
RECIPE: dict[str, Any] = {
    "teacher": [{"fingerprint": "a" * 64, "precision": "fp32"}],
    "data": {"fingerprint": "b" * 64, "holdout": 0, "omitted": []},
    "augmentation": {"train": [], "test": []},
    "normalisation": {"mean": [0.5], "std": [0.25]},
    "features": [[0, "layer1"], [0, "layer2"]],
    "signals": "fp16",
    "top_k": None,
    "rows": PASS_ROWS,
    "device": {"kind": "cpu", "threads": 1.0},
    "libraries": {"torch": "2"},
}
PAIRS = [
    FeaturePair(f"layer{index}", f"layer{index}", 0, "mse", 1.0, shape, shape, Connector("none", shape[0], shape[0]))
    for index, shape in enumerate([(2, 3, 5), (4,)])
]


def planned(folder: Path, **changes: Any) -> CachePlan:
    return replace(CachePlan("key", folder, RECIPE, VIEWS, top_k=None, features=True), **changes)


def said(split: str, view: int, rows: Tensor) -> Signals:
    """Numbers that name their place, as a teacher of sequences of two would say them."""
    place = {"train": 0, "test": 1000}[split] + 100 * view + rows.double()
    logits = torch.sin(place.view(-1, 1, 1) * (1 + torch.arange(2 * CLASSES).view(2, CLASSES))) * 5
    features = [
        torch.cos(
            place.view(-1, *([1] * len(pair.teacher_shape)))
            + torch.rand(pair.teacher_shape, generator=torch.Generator().manual_seed(1))
        )
        for pair in PAIRS
    ]
    return Signals(logits.half(), tuple(feature.half() for feature in features))


def write(plan: CachePlan, piece: Piece, ask: Callable[..., Signals] = said) -> None:
    is_train = piece.split == "train"
    rows = torch.arange(piece.first, piece.first + piece.rows)
    write_piece(
        piece.file(plan.folder),
        rows,
        lambda rows: rows,
        lambda rows: ask(piece.split, piece.view, rows),
        pass_rows=PASS_ROWS,
        top_k=plan.top_k if is_train else None,
        features=plan.features and is_train,
    )


def made(plan: CachePlan) -> CachePlan:
    for piece in missing_pieces(plan.folder, CUTS):
        write(plan, piece)
    complete_cache(plan, CUTS)
    return plan


def manifest(plan: CachePlan) -> dict[str, Any]:
    return dict(json.loads((plan.folder / "manifest.json").read_text()))


def check_all(cached: CachedSignals) -> None:
    generator = torch.Generator().manual_seed(0)
    everything = torch.cartesian_prod(torch.arange(TRAIN_ROWS), torch.arange(VIEWS))
    for size in (1, 7, 128):
        for picked in everything[torch.randperm(len(everything), generator=generator)].split(size):
            rows, views = picked.T
            found = cached.signals(rows.contiguous(), views.contiguous())
            for place, (row, view) in enumerate(picked.tolist()):
                expected = said("train", view, torch.tensor([row]))
                assert torch.equal(found.logits[place], expected.logits[0])
                for left, right in zip(found.features, expected.features, strict=True):
                    assert torch.equal(left[place], right[0])
    rows = torch.randperm(TEST_ROWS, generator=generator)
    assert torch.equal(cached.logits("test", rows), said("test", 0, rows).logits)


# ---------------------------------------------------------------------------------------------------------- the cut


def test_parts_and_pieces_are_whole_passes_and_cover_every_row_once() -> None:
    for rows, asked, kept, pass_rows in itertools.product((1, 1000, 70_000), (20, 80_000), (20, 4000), (1, 48, 3000)):
        cut = plan_cut("train", rows, 2, asked_bytes=asked, kept_bytes=min(asked, kept), pass_rows=pass_rows)
        assert cut.piece_rows % pass_rows == 0
        assert cut.part_rows % cut.piece_rows == 0
        parts = cut.parts()
        pieces = [piece for part in parts for piece in part.pieces(cut.piece_rows)]
        for pieces_or_parts in (parts, pieces):
            covered = [
                (item.view, row) for item in pieces_or_parts for row in range(item.first, item.first + item.rows)
            ]
            assert covered == [(view, row) for view in range(2) for row in range(rows)]
    fashion = plan_cut("train", 60_000, 1, asked_bytes=20, kept_bytes=20, pass_rows=128)
    assert len(fashion.parts()) == 1
    assert len(fashion.parts()[0].pieces(fashion.piece_rows)) == 59
    large = plan_cut("train", 60_000, 1, asked_bytes=131_072, kept_bytes=131_072, pass_rows=128)
    assert (large.piece_rows, large.part_rows) == (512, 512)


# ------------------------------------------------------------------------------------------------------- as it was said


def test_every_row_and_view_in_any_order_is_what_was_said(tmp_path: Path) -> None:
    plan = made(planned(tmp_path))
    check_all(CachedSignals(plan, PAIRS))
    known = manifest(plan)
    assert known["teacher_examples"] == TRAIN_ROWS * VIEWS + TEST_ROWS
    assert known["recipe"] == {**RECIPE, "views": VIEWS}
    assert known["top_k_error"] == []
    assert [part["name"] for part in known["parts"][:4]] == [
        "train/view-0/part-000000000.arrow",
        "train/view-0/part-000000024.arrow",
        "train/view-0/part-000000048.arrow",
        "train/view-1/part-000000000.arrow",
    ]
    names = {str(path.relative_to(tmp_path)) for path in tmp_path.rglob("*") if path.is_file()}
    assert names == {"manifest.json", *(part["name"] for part in known["parts"])}


def test_one_array_is_mapped_and_not_read(tmp_path: Path) -> None:
    plan = made(planned(tmp_path))
    column = map_columns(tmp_path / "train/view-0/part-000000000.arrow")["logits"]
    assert column.shape == (24, 2, CLASSES)
    assert column.dtype == np.float16
    assert column.flags["C_CONTIGUOUS"]
    assert not column.flags["WRITEABLE"]
    found = CachedSignals(plan, PAIRS).signals(torch.tensor([1]), torch.tensor([0])).logits
    found += 1  # a copy, which its taker may write to
    assert torch.equal(found - 1, (said("train", 0, torch.tensor([1])).logits + 1) - 1)


def test_rows_and_views_that_are_not_there_are_refused(tmp_path: Path) -> None:
    cached = CachedSignals(made(planned(tmp_path)), PAIRS)
    for row, view in ((TRAIN_ROWS, 0), (-1, 0), (0, VIEWS), (0, -1)):
        with pytest.raises(IndexError):
            cached.signals(torch.tensor([0, row]), torch.tensor([0, view]))


def test_a_cache_of_one_view_looks_at_no_view(tmp_path: Path) -> None:
    cuts = [replace(CUTS[0], views=1), CUTS[1]]
    plan = planned(tmp_path, views=1, features=False)
    for piece in missing_pieces(tmp_path, cuts):
        write(plan, piece)
    complete_cache(plan, cuts)
    found = CachedSignals(plan).signals(torch.tensor([3, 30]), torch.tensor([0, 8]))
    assert torch.equal(found.logits, said("train", 0, torch.tensor([3, 30])).logits)
    assert found.features == ()


def test_numbers_that_are_not_finite_are_not_stored(tmp_path: Path) -> None:
    def broken(split: str, view: int, rows: Tensor) -> Signals:
        return Signals(said(split, view, rows).logits.fill_(float("inf")))

    plan = planned(tmp_path)
    with pytest.raises(RunError, match=r"not finite in float16; write `distill\.signals: fp32`"):
        write(plan, CUTS[0].parts()[0].pieces(8)[0], broken)
    assert not list(tmp_path.rglob("*.arrow"))


# --------------------------------------------------------------------------------------------- nothing is asked twice


def test_after_a_kill_only_what_is_missing_is_asked(tmp_path: Path) -> None:
    plan = planned(tmp_path)
    pieces = missing_pieces(tmp_path, CUTS)
    assert sum(piece.rows for piece in pieces) == TRAIN_ROWS * VIEWS + TEST_ROWS
    for piece in reversed(pieces[5:]):
        write(plan, piece)
    unwhole = pieces[9].file(tmp_path)
    unwhole.write_bytes(unwhole.read_bytes()[:-30])
    assert missing_pieces(tmp_path, CUTS) == [*pieces[:5], pieces[9]]
    with pytest.raises(RunError, match="has not been computed"):
        CachedSignals(plan, PAIRS)
    made(plan)
    check_all(CachedSignals(plan, PAIRS))
    assert manifest(plan)["teacher_examples"] == TRAIN_ROWS * VIEWS + TEST_ROWS


def test_killed_while_parts_are_made_of_pieces(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    plan = planned(tmp_path / "killed")
    whole = made(planned(tmp_path / "whole"))
    for piece in missing_pieces(plan.folder, CUTS):
        write(plan, piece)
    complete_part = cache_files._complete_part

    def killed(folder: Path, cut: Cut, part: Part) -> Any:
        if part.view == 1:
            raise KeyboardInterrupt
        return complete_part(folder, cut, part)

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(cache_files, "_complete_part", killed)
        complete_cache(plan, CUTS)
    assert missing_pieces(plan.folder, CUTS) == []
    complete_cache(plan, CUTS)
    check_all(CachedSignals(plan, PAIRS))
    assert manifest(plan)["parts"] == manifest(whole)["parts"]


def test_a_damaged_file_is_found_and_it_alone_is_computed_anew(tmp_path: Path) -> None:
    plan = made(planned(tmp_path))
    before = manifest(plan)
    assert damaged_parts(tmp_path) == []
    file = tmp_path / "train/view-1/part-000000048.arrow"
    content = bytearray(file.read_bytes())
    content[len(content) // 2] ^= 1
    file.write_bytes(content)
    assert damaged_parts(tmp_path) == [file]
    assert remove_damaged(tmp_path) == [file]
    assert missing_pieces(tmp_path, CUTS) == [Piece("train", 1, 48, 2)]
    assert manifest(made(plan)) == before
    check_all(CachedSignals(plan, PAIRS))
    file.write_bytes(file.read_bytes()[:-1])
    with pytest.raises(RunError, match=r"part-000000048\.arrow is missing or damaged"):
        CachedSignals(plan, PAIRS)
    file.unlink()
    assert damaged_parts(tmp_path) == [file]


def small_plan(folder: Path, monkeypatch: pytest.MonkeyPatch) -> tuple[Plan, list[int]]:
    """A plan whose teacher needs no Ray, and the numbers of examples that it was asked about."""
    asked: list[int] = []
    facts = {"num_parameters": 1, "num_trainable": 1, "parameter_sizes": (1,), "buffer_bytes": 0}
    known = ModelFacts(**facts, activation_bytes_per_example=1, forward_flops_per_example=1, output_shape=(10,))
    job = JobConfig.model_validate(
        {
            "name": "student",
            "model": {"kind": "mlp", "hidden": [8]},
            "data": {"kind": "synthetic", "shape": [4], "train_examples": 50, "test_examples": 11, "global_batch": 10},
            "optimizer": {"kind": "sgd", "lr": 0.1},
            "budget": {"steps": 2},
            "storage": str(folder),
        }
    )
    with monkeypatch.context() as patch:
        patch.setattr(probe, "_ask", lambda *_: asdict(known))
        plan = build_plan(job, ClusterShape(1, 2.0, 0.0), folder)
    cache = planned(folder / "teachers" / "key", features=False)
    distill = DistillPlan((), (known,), (), PASS_ROWS, cache, folder / "evaluation.json")
    distilled = JobConfig.model_validate({**job.model_dump(), "distill": {"teacher": "wise.yaml"}})

    def ask(plan: Plan, import_folders: Any, pieces: list[Piece]) -> None:
        asked.append(sum(piece.rows for piece in pieces))
        for piece in pieces:
            write(cache, piece)

    monkeypatch.setattr(teacher_cache, "_ask", ask)
    monkeypatch.setattr(cache_files, "PIECE_ROWS", 8)
    monkeypatch.setattr(cache_files, "PART_BYTES", 24 * 20)
    return replace(plan, job=distilled, distill=distill), asked


@pytest.mark.parametrize("is_mended", [True, False])
def test_two_commands_that_look_at_one_damaged_cache(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, is_mended: bool
) -> None:
    """Between the looking and the acting of one, the other mends the cache, or begins to and is stopped."""
    plan, asked = small_plan(tmp_path, monkeypatch)
    assert make_cache(plan, ()) == sum(asked) == TRAIN_ROWS * VIEWS + TEST_ROWS
    folder = tmp_path / "teachers" / "key"
    before = json.loads((folder / "manifest.json").read_text())
    part = before["parts"][1]
    (folder / part["name"]).write_bytes(b"damaged")
    digests, others = cache_files._digests, [make_cache if is_mended else lambda *_: remove_damaged(folder)]

    def looked(files: Any) -> list[str]:
        seen = digests(files)
        if others:
            others.pop()(plan, ())
        return seen

    monkeypatch.setattr(cache_files, "_digests", looked)
    told: list[str] = []
    assert make_cache(plan, (), told.append) == (0 if is_mended else part["rows"])
    assert asked[1:] == [part["rows"]]
    assert [text for text in told if "damaged" in text] == []
    assert json.loads((folder / "manifest.json").read_text()) == before
    assert damaged_parts(folder) == []


def test_a_damaged_cache_is_mended_by_the_next_command(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    plan, asked = small_plan(tmp_path, monkeypatch)
    make_cache(plan, ())
    folder = tmp_path / "teachers" / "key"
    part = json.loads((folder / "manifest.json").read_text())["parts"][1]
    (folder / part["name"]).write_bytes(b"damaged")
    told: list[str] = []
    assert make_cache(plan, (), told.append) == part["rows"] == asked[-1]
    assert told[0] == f"{folder / part['name']} is damaged and is computed anew"
    assert (make_cache(plan, ()), len(asked)) == (0, 2)


# ---------------------------------------------------------------------------------------------- nothing wrong is reused


@pytest.mark.parametrize(
    ("key", "value", "told"),
    [
        ("teacher", [{"fingerprint": "c" * 64, "precision": "fp32"}], "another teacher"),
        ("data", {"fingerprint": "c" * 64, "holdout": 0, "omitted": []}, "another data set"),
        ("augmentation", {"train": [{"kind": "random_crop"}], "test": []}, "another augmentation"),
        ("normalisation", {"mean": [0.0], "std": [1.0]}, "another normalisation of the inputs"),
        ("features", [[0, "layer1"]], "other features"),
        ("signals", "fp32", "another type of signals"),
        ("top_k", 3, "another top_k"),
        ("rows", 5, "another number of examples in a pass of the teacher"),
        ("device", {"kind": "cuda", "threads": None}, "another kind of device or number of threads"),
        ("libraries", {"torch": "3"}, "other versions of the libraries"),
    ],
)
def test_what_changed_is_named(tmp_path: Path, key: str, value: Any, told: str) -> None:
    plan = made(planned(tmp_path))
    with pytest.raises(RunError) as raised:
        CachedSignals(planned(tmp_path, recipe={**RECIPE, key: value}), PAIRS)
    assert f"was made with {told} (" in str(raised.value)
    assert " and " not in str(raised.value).split("; ")[0]
    CachedSignals(planned(tmp_path, recipe=dict(reversed(RECIPE.items()))), PAIRS)
    assert plan.recipe.keys() == RECIPE.keys()


def test_several_changes_an_entry_more_and_other_views_are_named(tmp_path: Path) -> None:
    made(planned(tmp_path))
    with pytest.raises(RunError) as raised:
        CachedSignals(planned(tmp_path, recipe={**RECIPE, "signals": "fp32", "palette": "red"}, views=2), PAIRS)
    assert str(raised.value) == (
        f'the cache in {tmp_path} was made with another type of signals ("fp16", now "fp32") and another palette '
        '(null, now "red") and another number of views (3, now 2); delete it and run the job again'
    )


def test_features_that_the_job_needs_must_be_there(tmp_path: Path) -> None:
    plan = made(planned(tmp_path))
    with pytest.raises(RunError, match=r"has features of the shapes \[\(2, 3, 5\), \(4,\)\], the job needs \[\]"):
        CachedSignals(plan)


# ---------------------------------------------------------------------------------------------------------- processes


def _sum(rank: int, cached: CachedSignals) -> float:
    rows = torch.arange(TRAIN_ROWS)
    return float(cached.signals(rows, rows % VIEWS).logits.double().sum())


@pytest.mark.slow
def test_two_processes_read_one_cache(tmp_path: Path) -> None:
    cached = CachedSignals(made(planned(tmp_path)), PAIRS)
    check_all(pickle.loads(pickle.dumps(cached)))
    assert run_distributed(_sum, 2, cached) == [_sum(0, cached)] * 2


def _write_all(folder: Path, order: int) -> None:
    plan = planned(folder)
    for piece in missing_pieces(folder, CUTS)[::order]:
        write(plan, piece)


def test_two_processes_that_write_the_same_do_not_disturb_each_other(tmp_path: Path) -> None:
    context = multiprocessing.get_context("fork")
    writers = [context.Process(target=_write_all, args=(tmp_path, order)) for order in (1, -1)]
    for writer in writers:
        writer.start()
    for writer in writers:
        writer.join()
        assert writer.exitcode == 0
    assert missing_pieces(tmp_path, CUTS) == []
    check_all(CachedSignals(made(planned(tmp_path)), PAIRS))


# -------------------------------------------------------------------------------------------------------------- top_k


def random_logits(seed: int, classes: int, scale: float) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    logits = scale * torch.randn(64, 3, classes, generator=generator, dtype=torch.float64)
    logits[0] = 0.0
    logits[1, :, 0] = 40.0
    return logits.half()


def restored(logits: Tensor, top_k: int) -> tuple[Tensor, Tensor]:
    kept = keep_largest(logits, top_k)
    return restore(kept, logits.shape[-1]), torch.from_numpy(kept["classes"].astype(np.int64))


@pytest.mark.parametrize(("classes", "top_k", "scale"), [(10, 1, 0.1), (10, 9, 5.0), (100, 5, 3.0), (1000, 20, 8.0)])
def test_top_k_is_exact_in_what_it_keeps_and_in_the_mass_of_the_others(classes: int, top_k: int, scale: float) -> None:
    logits = random_logits(classes, classes, scale)
    back, kept = restored(logits, top_k)
    assert torch.equal(back.gather(-1, kept), logits.gather(-1, kept).float())
    assert torch.equal(kept.sort(-1).values, kept.sort(-1).values.unique_consecutive(dim=-1))
    assert logits.gather(-1, kept).amin() >= logits.scatter(-1, kept, -torch.inf).amax(-1).amin()
    teacher, student = (torch.softmax(values.double(), -1) for values in (logits, back))
    torch.testing.assert_close(student.gather(-1, kept), teacher.gather(-1, kept), rtol=2e-6, atol=0)
    torch.testing.assert_close(left_mass(back, kept, 1.0), left_mass(logits, kept, 1.0), rtol=4e-6, atol=1e-30)


@pytest.mark.parametrize("temperature", [0.25, 0.5, 1.0, 2.0, 4.0, 8.0, 20.0])
def test_the_bound_on_the_distance_holds_at_every_temperature(temperature: float) -> None:
    for seed, (classes, top_k, scale) in enumerate(itertools.product((5, 100), (1, 4), (0.1, 1.0, 10.0))):
        logits = random_logits(seed, classes, scale)
        back, kept = restored(logits, top_k)
        given, found = (torch.softmax(values.double() / temperature, -1) for values in (logits, back))
        distance = (given - found).abs().sum(-1) / 2
        bound = left_mass(back if temperature >= 1 else logits, kept, temperature)
        assert (distance <= bound * (1 + 1e-5) + 1e-14).all()


def test_of_equal_logits_the_lower_classes_are_kept() -> None:
    kept = keep_largest(torch.tensor([[1.0, 3.0, 1.0, 1.0, 3.0]]).half(), 3)
    assert kept["classes"].tolist() == [[1, 4, 0]]
    assert kept["classes"].dtype == np.uint16
    assert kept["largest"].dtype == np.float16
    assert kept["rest"].tolist() == [1.0]
    assert keep_largest(torch.zeros(1, 70_000), 2)["classes"].dtype == np.int32


def test_the_measured_error_of_top_k_is_in_the_manifest(tmp_path: Path) -> None:
    plan = made(planned(tmp_path, top_k=2, recipe={**RECIPE, "top_k": 2}))
    rows, views = (part.contiguous() for part in torch.cartesian_prod(torch.arange(TRAIN_ROWS), torch.arange(VIEWS)).T)
    cached = CachedSignals(plan, PAIRS)
    found = cached.signals(rows, views)
    whole = torch.cat(
        [said("train", view, rows[index : index + 1]).logits for index, view in enumerate(views.tolist())]
    )
    assert found.logits.dtype == torch.float32
    assert torch.equal(found.logits, restored(whole, 2)[0])
    assert found.features[0].dtype == torch.float16
    assert torch.equal(cached.logits("test", torch.arange(TEST_ROWS)), said("test", 0, torch.arange(TEST_ROWS)).logits)
    errors = manifest(plan)["top_k_error"]
    assert [error["temperature"] for error in errors] == list(TEMPERATURES)
    for error in errors:
        given, back = (torch.softmax(values.double() / error["temperature"], -1) for values in (whole, found.logits))
        distance = (given - back).abs().sum(-1) / 2
        assert error["mean"] == pytest.approx(float(distance.mean()), rel=1e-9)
        assert error["largest"] == pytest.approx(float(distance.max()), rel=1e-9)
        assert 0 < error["mean"] < error["largest"] <= error["bound"] < 1


# ----------------------------------------------------------------------------------------------------------- Ray Data


@pytest.fixture(scope="module")
def embedded_ray() -> Any:
    import ray

    ray.init(address="local", num_cpus=2, include_dashboard=False, log_to_driver=False, logging_level="ERROR")
    yield ray
    ray.shutdown()


def digits_plan(folder: Path, **distill: Any) -> Plan:
    """1,000 training digits in two augmented views, and a teacher with weights of no training."""
    augment = [{"kind": "random_crop", "padding": 1}]
    data = {"kind": "digits", "global_batch": 32, "holdout": 437, "augment": augment, "omit_classes": [3]}
    weights = folder / "teacher.safetensors"
    section = {"model": {"kind": "mlp", "hidden": [32]}, "weights": str(weights)}
    job = JobConfig.model_validate(
        {
            "name": "student",
            "model": {"kind": "mlp", "hidden": [8]},
            "data": data,
            "optimizer": {"kind": "sgd", "lr": 0.1},
            "budget": {"steps": 2},
            "storage": str(folder),
            "distill": {"teacher": section, "cache": "logits", "views": 2, "teacher_batch": 48, **distill},
        }
    )
    model = MLPModel(kind="mlp", hidden=[32])
    if not weights.exists():
        save_file(build_model(model, data_facts(job.data, folder), 5).state_dict(), weights)
    teacher = Teacher("teacher", "teacher", "weights", weights, model, "f" * 64)
    return build_plan(job, ClusterShape(1, 2.0, 0.0), folder, [teacher])


@pytest.mark.slow
@pytest.mark.ray
def test_ray_data_makes_what_a_live_teacher_says(
    embedded_ray: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(cache_files, "PIECE_ROWS", 200)
    monkeypatch.setattr(cache_files, "PART_BYTES", 500 * 20)
    plan = digits_plan(tmp_path)
    assert plan.distill is not None
    assert plan.distill.cache is not None
    cache = plan.distill.cache
    told: list[str] = []
    splits = load_splits(plan.job.data, tmp_path, plan.data)
    train_rows = len(splits["train"])
    assert 880 < train_rows < 920
    examples = 2 * train_rows + 437 + 360
    assert make_cache(plan, (), told.append) == examples
    assert told == [f"asking the teacher about {examples:,} of {examples:,} examples"]
    assert manifest(cache)["teacher_examples"] == examples
    assert len(manifest(cache)["parts"]) == 2 * 3 + 1 + 1
    assert make_cache(plan, ()) == 0

    torch.set_num_threads(1)
    teacher = build_teacher(plan.distill, plan.data, signals="fp16", device=torch.device("cpu"))
    cached, augmentation = CachedSignals(cache), build_transforms(plan.job.data.augment)
    for seed in range(5):
        generator = torch.Generator().manual_seed(seed)
        rows = torch.randperm(train_rows, generator=generator)[:37]
        views = torch.randint(2, (37,), generator=generator)
        seen = view_batch(splits["train"], plan.data, augmentation, plan.job.seed, rows.numpy(), views.numpy())
        assert torch.equal(cached.signals(rows, views).logits, teacher.ask(seen.inputs).logits)
    evaluated: list[SplitName] = ["validation", "test"]
    for name in evaluated:
        for batch, _ in eval_batches(plan.job.data, splits[name], plan.data, rank=0, world_size=1, batch=100):
            assert torch.equal(cached.logits(name, batch.indices), teacher.ask(batch.inputs).logits)

    # Two files lost, one by damage: only they are computed anew.
    known = manifest(cache)
    part = known["parts"][1]
    (cache.folder / part["name"]).write_bytes(b"damaged")
    (cache.folder / known["parts"][-1]["name"]).unlink()
    assert make_cache(plan, (), told.append) == part["rows"] + 360
    assert f"{cache.folder / part['name']} is damaged and is computed anew" in told
    assert manifest(cache) == known


@pytest.mark.slow
@pytest.mark.ray
def test_a_mistake_comes_back_as_what_it_is(embedded_ray: Any, tmp_path: Path) -> None:
    plan = digits_plan(tmp_path)
    assert plan.distill is not None
    without = plan.job.data.model_copy(update={"omit_classes": list(range(10))})
    with pytest.raises(RunError, match="every one of the 1000 training examples"):
        make_cache(replace(plan, job=plan.job.model_copy(update={"data": without})), ())
    (teacher,) = plan.distill.teachers
    unknown = replace(teacher, model=PythonModel(kind="python", target="nowhere:build"))
    with pytest.raises(JobError, match="module `nowhere` is not found") as raised:
        make_cache(replace(plan, distill=replace(plan.distill, teachers=(unknown,))), ())
    assert len(raised.value.problems) == 1
