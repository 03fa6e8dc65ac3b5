"""What is to be looked at of dense-sparse-dense training: the summary of the weights, the figures, `temper report`, and
the export of a sparse network with its masks."""

from __future__ import annotations

import itertools
import json
import re
import shutil
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from html import escape
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from safetensors.torch import load_file
from torch import Tensor, nn

import mlp_facts
from temper import checkpoint
from temper.checkpoint import MASK, MASTER, CheckpointReader, Shard
from temper.cli import main
from temper.config.load import build_job, job_to_yaml
from temper.data.batches import eval_batches
from temper.data.sources import load_split
from temper.errors import JobError
from temper.export import evaluate_product, export_product, find_product
from temper.launch.teachers import plan_job
from temper.models.build import build_model
from temper.plan import probe
from temper.plan.build import Plan, build_plan
from temper.plan.mesh import local_cluster
from temper.plan.phases import PhasePlan, Pruning
from temper.plan.probe import ModuleOutput
from temper.techniques.dsd.masks import select_mask
from temper.techniques.dsd.summary import BINS, LEVELS, summarize, widen, write_summary
from temper.tracking import figures as drawing
from temper.tracking import report
from temper.tracking.figures import PhaseData, draw_figures, rounds, short_name
from temper.tracking.report import build_page, log_plots, write_report

RUN_ID = "0123456789abcdef0123456789abcdef"
Weights = Mapping[str, Tensor]


def save(folder: Path, step: int, weights: Weights, masks: Weights, records: Sequence[Any] = ()) -> Path:
    """A checkpoint of these weights and masks under the phase's `folder`."""
    path = checkpoint.checkpoint_folder(folder / "checkpoints", step)
    shards = [Shard(name, 0, {MASTER: weight.reshape(-1)}) for name, weight in weights.items()]
    shards += [Shard(name, 0, {MASK: mask.reshape(-1)}) for name, mask in masks.items()]
    checkpoint.write_shards(path, 0, shards)
    shapes = {name: tuple(weight.shape) for name, weight in weights.items()}
    checkpoint.write_manifest(path, 1, {"step": step, "engine": {}}, shapes, records)
    return path


# ---------------------------------------------------------------------------------------------------------- summary

SPARSE = PhasePlan("sparse-1", "sparse", 10, 10, 0.1, "s", {}, Pruning("weights", "magnitude", {"a": 0.5, "b": 0.5}, 0))
REDENSE = PhasePlan("redense-1", "redense", 20, 10, 0.01, "r", {})
DENSE_END = {"a": torch.tensor([[0.25, -0.5, 1.0], [0.125, -2.0, 0.5]]), "b": torch.tensor([8.0, -4.0])}
MASKS = {"a": torch.tensor([[False, False, True], [False, True, True]]), "b": torch.tensor([True, False])}
SPARSE_END = {"a": torch.tensor([[0.0, 0.0, 1.5], [0.0, -2.0, 0.0]]), "b": torch.tensor([6.0, 0.0])}
REDENSE_END = {"a": torch.tensor([[0.5, -0.75, 1.5], [0.0, -2.0, 0.25]]), "b": torch.tensor([6.0, 1.0])}


@pytest.fixture
def ends(tmp_path: Path) -> tuple[Path, Path, Path]:
    """The last checkpoints of a dense, a sparse and a re-dense phase, and the sparse phase's summary in its folder."""
    dense = save(tmp_path / "dense", 10, DENSE_END, {})
    sparse = save(tmp_path / "sparse", 20, SPARSE_END, MASKS)
    redense = save(tmp_path / "redense", 30, REDENSE_END, {})
    write_summary(tmp_path / "sparse", summarize(SPARSE, ["a", "b"], dense, sparse))
    return dense, sparse, redense


def filled(counts: Sequence[int], limit: float) -> dict[float, int]:
    """The bins that are not empty, by their lower edge."""
    width = 2 * limit / BINS
    return {-limit + index * width: count for index, count in enumerate(counts) if count}


def test_the_summary_of_a_sparse_phase_is_exact(ends: tuple[Path, Path, Path]) -> None:
    summary = summarize(SPARSE, ["a", "b"], ends[0], ends[1])
    assert (summary["phase"], summary["kind"], list(summary["layers"])) == ("sparse-1", "sparse", ["a", "b"])
    a, b, total = summary["layers"]["a"], summary["layers"]["b"], summary["total"]
    assert (a["weights"], a["pruned"], a["zeros"]) == (6, 3, {"before": 0, "end": 4})
    assert (a["threshold"], b["threshold"]) == (0.5, 4.0)
    assert (a["limit"], b["limit"], total["limit"]) == (4.0, 16.0, 16.0)
    assert filled(a["histogram"]["before"], 4.0) == {0.25: 1, -0.5: 1, 1.0: 1, 0.125: 1, -2.0: 1, 0.5: 1}
    assert filled(a["histogram"]["end"], 4.0) == {1.5: 1, -2.0: 1}
    assert filled(total["histogram"]["before"], 16.0) == {-4.0: 1, -2.0: 1, -0.5: 1, 0.125: 1, 0.25: 1, 0.5: 1} | {
        1.0: 1,
        8.0: 1,
    }
    assert (total["weights"], total["pruned"], total["zeros"]) == (8, 4, {"before": 0, "end": 5})
    assert (a["returned"], total["returned"]) == (None, None)


def test_the_summary_of_a_redense_phase_says_what_came_back(ends: tuple[Path, Path, Path]) -> None:
    summary = summarize(REDENSE, ["a", "b"], ends[1], ends[2])
    a, b, total = summary["layers"]["a"], summary["layers"]["b"], summary["total"]
    assert (a["pruned"], a["zeros"], a["threshold"]) == (3, {"before": 4, "end": 1}, 0.5)
    # Formerly pruned are now 0, 0.5 and 0.75, the kept ones 0.25, 1.5 and 2: 0.5 is not above the threshold 0.5.
    assert LEVELS == (0.1, 0.25, 0.5, 0.75, 0.9)
    expected = [0.0, 0.0, 0.5 / 1.5, 0.5, 0.5]
    assert a["returned"].pop("quantiles") == pytest.approx(expected)
    assert a["returned"] == {"nonzero": 2, "above_threshold": 1, "kept_median": 1.5}
    assert b["returned"] == {
        "nonzero": 1,
        "above_threshold": 0,
        "kept_median": 6.0,
        "quantiles": [pytest.approx(1 / 6)] * 5,
    }
    assert total["returned"] == {"nonzero": 3, "above_threshold": 1}
    assert total["zeros"] == {"before": 5, "end": 1}


def test_ranks_share_the_work_and_have_the_same_summary(ends: tuple[Path, Path, Path]) -> None:
    parts: list[dict[str, Any]] = []
    whole = summarize(SPARSE, ["b", "a"], ends[0], ends[1])
    for rank in (1, 0):
        shared = summarize(
            SPARSE,
            ["b", "a"],
            ends[0],
            ends[1],
            rank=rank,
            size=2,
            share=lambda own: parts.append(own) or [whole["layers"]],
        )
        assert shared == whole
    assert [list(part) for part in parts] == [["a"], ["b"]]
    joined = summarize(SPARSE, ["b", "a"], ends[0], ends[1], rank=0, size=2, share=lambda own: [own, parts[0]])
    assert json.dumps(joined) == json.dumps(whole)


@pytest.mark.parametrize(
    ("structure", "criterion"), [("weights", "random"), ("channels", "magnitude"), ("1:2", "magnitude")]
)
def test_without_a_threshold_nothing_is_above_it(tmp_path: Path, structure: str, criterion: str) -> None:
    pruning = Pruning(structure, criterion, {"a": 0.5}, 3)
    weight = {"a": torch.randn(4, 4, generator=torch.Generator().manual_seed(0))}
    masks = {"a": select_mask("a", weight["a"], pruning)}
    pruned = {"a": torch.where(masks["a"], weight["a"], 0.0)}
    ends = (
        save(tmp_path / "d", 1, weight, {}),
        save(tmp_path / "s", 2, pruned, masks),
        save(tmp_path / "r", 3, weight, {}),
    )
    sparse = summarize(replace(SPARSE, pruning=pruning), ["a"], *ends[:2])
    write_summary(tmp_path / "s", sparse)
    redense = summarize(REDENSE, ["a"], *ends[1:])
    assert (sparse["layers"]["a"]["pruned"], sparse["layers"]["a"]["threshold"]) == (8, None)
    assert redense["layers"]["a"]["threshold"] is None
    assert redense["total"]["returned"] == {"nonzero": 8, "above_threshold": None}


def test_weights_that_are_not_finite_and_layers_of_zeros_are_summarized(tmp_path: Path) -> None:
    """A run that diverges ends with what it has: the summary is no place to fail."""
    broken = {"a": torch.tensor([[float("nan"), float("inf")], [0.5, 0.0]]), "b": torch.zeros(2)}
    masks = {"a": torch.tensor([[True, True], [False, False]]), "b": torch.tensor([True, False])}
    before, end = save(tmp_path / "d", 1, broken, masks), save(tmp_path / "s", 2, broken, masks)
    summary = summarize(SPARSE, ["a", "b"], before, end)
    assert filled(summary["layers"]["a"]["histogram"]["end"], 1.0) == {0.5: 1}
    assert (summary["layers"]["b"]["limit"], summary["layers"]["b"]["zeros"]["end"]) == (1.0, 2)
    again = summarize(REDENSE, ["a", "b"], before, end)
    assert again["layers"]["b"]["returned"]["quantiles"] is None


def test_no_layers_are_no_weights(ends: tuple[Path, Path, Path]) -> None:
    summary = summarize(SPARSE, [], ends[0], ends[1])
    assert (summary["layers"], summary["total"]["weights"], summary["total"]["returned"]) == ({}, 0, None)


@pytest.mark.parametrize("factor", [1, 2, 16, 256, 4096])
def test_a_wider_histogram_is_that_of_the_weights(factor: int) -> None:
    weights = torch.randn(5000, generator=torch.Generator().manual_seed(1)).clamp(-3.9, 3.9)
    narrow, wide = counted(weights, 4.0), counted(weights, 4.0 * factor)
    assert widen(narrow, 4.0, 4.0 * factor).tolist() == wide


def counted(weights: Tensor, limit: float) -> list[int]:
    bins = torch.floor(weights.double() / (2 * limit / BINS)).long() + BINS // 2
    return torch.bincount(bins, minlength=BINS).tolist()


# ------------------------------------------------------------------------------------------------------------- a run


@dataclass(frozen=True)
class Made:
    """A finished run of dense-sparse-dense training, made without Ray; `phases` gives the folder of each."""

    plan: Plan
    folder: Path
    phases: dict[str, Path]


JOB: dict[str, Any] = {
    "name": "made",
    "model": {"kind": "mlp", "hidden": [32]},
    "data": {"kind": "digits", "global_batch": 64, "holdout": 100},
    "optimizer": {"kind": "sgd", "lr": 0.1, "momentum": 0.9},
    "budget": {"steps": 20},
    "dsd": {"rounds": [{"sparsity": {"1": 0.75, "3": 0.5}, "sparse_steps": 20, "redense_steps": 10}]},
}
FACTS = replace(mlp_facts.FACTS, prunable=mlp_facts.PRUNABLE)


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Made:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(probe, "_ask", lambda *_: json.loads(json.dumps(asdict(FACTS))))
        return make_run(tmp_path_factory.mktemp("made"), JOB)


@pytest.fixture
def own(made: Made, tmp_path: Path) -> Made:
    """A copy of the run that a test may change."""
    storage = tmp_path / "runs"
    shutil.copytree(made.folder.parent, storage)
    moved = {name: storage / "phases" / folder.name for name, folder in made.phases.items()}
    return Made(made.plan, storage / made.folder.name, moved)


def make_run(folder: Path, values: dict[str, Any]) -> Made:
    """Trains the job's small net on the digits as its phases say, and writes what temper would."""
    job = build_job({**values, "storage": str(folder / "runs")})
    plan = build_plan(job, local_cluster(), folder)
    made = Made(plan, plan.run_folder, {phase.name: plan.phase_folder(phase) for phase in plan.phases})
    for place in (made.folder, *made.phases.values()):
        place.mkdir(parents=True)
        (place / "job.yaml").write_text(job_to_yaml(job))
        (place / "plan.json").write_text(json.dumps({**plan.to_dict(), "import_folders": [str(folder)]}))
    (made.folder / "run.json").write_text(json.dumps({"run_id": RUN_ID, "uri": "", "open": False}))
    model = build_model(job.model, plan.data, job.seed)
    before, layers = None, [weight.name for weight in FACTS.prunable]
    for phase in plan.phases:
        masks = train_phase(model, plan, phase)
        records = [record(plan, phase, step, model) for step in range(phase.first_step + 1, phase.last_step + 1)]
        place = made.phases[phase.name]
        (place / "history.jsonl").write_text("".join(json.dumps(item) + "\n" for item in records))
        end = save(place, phase.last_step, dict(model.named_parameters()), masks, records[-1:])
        if before is not None:
            write_summary(place, summarize(phase, layers, before, end))
        manifest = {"name": phase.name, "fingerprint": phase.fingerprint, "steps": phase.last_step, "seconds": 1.5}
        manifest |= {"checkpoint": str(end.relative_to(place)), "metrics": records[-1]["metrics"]}
        (place / "phase.json").write_text(json.dumps(manifest))
        before = end
    return made


def train_phase(model: nn.Module, plan: Plan, phase: PhasePlan) -> dict[str, Tensor]:
    """Trains on the training split, with pruned weights held at zero; gives the masks."""
    weights = dict(model.named_parameters())
    layers = phase.pruning.layers if phase.pruning else {}
    masks = {name: select_mask(name, weights[name], phase.pruning) for name in layers if phase.pruning}
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    split = load_split(plan.job.data, "train", Path(plan.job.storage), plan.data)
    batches = eval_batches(plan.job.data, split, plan.data, rank=0, world_size=1, batch=128)
    for batch, _ in itertools.islice(itertools.cycle(list(batches)), phase.steps):
        optimizer.zero_grad()
        nn.functional.cross_entropy(model(batch.inputs), batch.targets).backward()
        optimizer.step()
        with torch.no_grad():
            for name, mask in masks.items():
                weights[name] *= mask
    return masks


def record(plan: Plan, phase: PhasePlan, step: int, model: nn.Module) -> dict[str, Any]:
    metrics = {"train/loss": 2.0 / step, "train/lr": phase.lr, "phase": float(plan.phases.index(phase))}
    if step % 5 == 0:
        metrics |= {"eval/loss": 2.5 / step, "eval/accuracy": 1 - 1 / step}
        if phase.kind != "dense":
            zeros = {weight.name: (model.get_parameter(weight.name) == 0).double().mean() for weight in FACTS.prunable}
            metrics |= {f"sparsity/{name}": float(share) for name, share in zeros.items()}
            metrics["sparsity"] = float(sum(zeros.values()) / len(zeros))
    if step == phase.last_step:
        metrics |= {"test/loss": 0.25, "test/accuracy": 0.875}
    return {"step": step, "time_ms": 1000 * step, "metrics": metrics}


# ----------------------------------------------------------------------------------------------------------- figures


@pytest.fixture(scope="module")
def figures(made: Made) -> dict[str, str]:
    return draw_figures(phase_data(made))


@pytest.fixture(scope="module")
def page(made: Made) -> str:
    return build_page(made.folder)


@pytest.fixture
def undrawn(monkeypatch: pytest.MonkeyPatch) -> None:
    """Pages without figures, which take time."""
    monkeypatch.setattr(report, "draw_figures", lambda phases: {})


def phase_data(made: Made) -> list[PhaseData]:
    return [
        report._read_phase(asdict(phase), made.phases[phase.name])  # as a page and MLflow read them
        for phase in made.plan.phases
    ]


def texts_of(svg: str) -> list[str]:
    return re.findall(r"<text[^>]*>([^<]*)</text>", svg)


def test_every_figure_of_a_round_is_drawn_and_labelled(figures: dict[str, str]) -> None:
    assert list(figures) == ["training", "sparsity", "weights-1", "returned-1"]
    for svg in figures.values():
        assert svg.startswith("<svg") and svg.endswith("</svg>\n")
    names = {"dense", "sparse-1", "redense-1"}
    assert {"accuracy", "loss", "learning rate", "optimizer step", *names} <= set(texts_of(figures["training"]))
    assert {"1", "3", "optimizer step", "zero (%)", *names} <= set(texts_of(figures["sparsity"]))
    assert {"end of sparse-1", "end of redense-1", "all pruned layers", "75% zero", "50% zero"} <= set(
        texts_of(figures["weights-1"])
    )
    assert {"above the threshold", "threshold", "median", "1", "3"} <= set(texts_of(figures["returned-1"]))


def test_the_same_data_is_the_same_picture(made: Made, figures: dict[str, str]) -> None:
    assert draw_figures(phase_data(made)) == figures


def test_figures_show_what_there_is(made: Made, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("training", "sparsity", "weights", "returned"):
        monkeypatch.setattr(drawing, f"draw_{name}", lambda *_: "drawn")
    dense, sparse, redense = phase_data(made)
    assert draw_figures([replace(dense, records=[], metrics={})]) == {}
    assert list(draw_figures([dense])) == ["training"]
    assert list(draw_figures([dense, sparse])) == ["training", "sparsity", "weights-1"]
    unfinished = replace(redense, weights=None)
    assert list(draw_figures([dense, sparse, unfinished])) == ["training", "sparsity", "weights-1"]
    nothing = [replace(phase, weights=summary_of_nothing(phase)) for phase in (sparse, redense)]
    assert list(draw_figures([dense, *nothing])) == ["training", "sparsity"]


def test_a_round_that_has_just_begun_is_drawn(made: Made) -> None:
    dense, sparse, _ = phase_data(made)
    begun = replace(sparse, records=sparse.records[:3], metrics={}, weights=None)
    assert list(draw_figures([dense, begun])) == ["training"]


def summary_of_nothing(phase: PhaseData) -> dict[str, Any]:
    """Of a round that prunes nothing: the control with the same restarts."""
    assert phase.weights is not None
    return {"layers": {}, "total": {**phase.weights["total"], "weights": 0, "pruned": 0}}


def test_names_with_markup_and_dollars_are_only_text(made: Made) -> None:
    dense, sparse, _ = phase_data(made)
    assert sparse.weights is not None
    odd = "<script>$x$&.weight"
    layers = {odd if name == "1.weight" else name: layer for name, layer in sparse.weights["layers"].items()}
    svg = draw_figures([dense, replace(sparse, weights={**sparse.weights, "layers": layers})])["weights-1"]
    assert "&lt;script&gt;$x$&amp;" in svg
    assert "<script" not in svg


def test_rounds_pair_the_phases(made: Made) -> None:
    dense, sparse, redense = phase_data(made)
    second = replace(sparse, name="sparse-2")
    found = rounds([dense, sparse, redense, second])
    assert [(item.number, item.before.name, item.sparse.name) for item in found] == [
        (1, "dense", "sparse-1"),
        (2, "redense-1", "sparse-2"),
    ]
    assert [item.redense and item.redense.name for item in found] == ["redense-1", None]
    assert rounds([dense]) == []


def test_losses_that_are_not_numbers_are_drawn_as_gaps(made: Made) -> None:
    dense = phase_data(made)[0]
    records = [{**item, "metrics": {**item["metrics"], "train/loss": float("nan")}} for item in dense.records]
    assert list(draw_figures([replace(dense, records=records)])) == ["training"]


def test_a_long_name_keeps_both_ends() -> None:
    assert short_name("layer1.0.conv1.weight") == "layer1.0.conv1"
    assert short_name("abcdefghij.klmnop.weight", 9) == "abcd…mnop"
    assert short_name("rnn.weight_ih_l0") == "rnn.weight_ih_l0"


# ------------------------------------------------------------------------------------------------------------ report


class Page(HTMLParser):
    """Tags that were opened, attributes that name something to load, and whether every tag was closed in order."""

    def __init__(self, html: str) -> None:
        super().__init__()
        self.tags: list[str] = []
        self.loads: list[str] = []
        self._open: list[str] = []
        self.feed(html)
        self.close()
        assert self._open == []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        self.loads += [value or "" for name, value in attrs if name in ("src", "href", "xlink:href", "data", "action")]
        if tag != "meta":
            self._open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.handle_starttag(tag, attrs)
        self._open.pop()

    def handle_endtag(self, tag: str) -> None:
        assert self._open.pop() == tag


def cells(page: str, first: str) -> list[str]:
    """Of the table row that begins with this cell."""
    (row,) = re.findall(rf"<tr><td[^>]*>{re.escape(first)}</td>.*?</tr>", page)
    return re.findall(r"<td[^>]*>(.*?)</td>", row)


def test_the_page_says_what_the_run_is(made: Made, page: str) -> None:
    dense, sparse, redense = made.plan.phases
    header = re.findall(r"<th>(.*?)</th>", page.split("<h2>Phases</h2>")[1].split("</tr>")[0])
    assert header[:5] == ["phase", "steps", "learning rate", "pruned", "zero weights"]
    found = {phase.name: dict(zip(header, cells(page, phase.name), strict=True)) for phase in made.plan.phases}
    assert found["dense"]["steps"] == "0–20"
    assert found["sparse-1"]["pruned"] == "50–75 % of 2 layers"
    assert found["sparse-1"]["zero weights"] == "62.5 %"
    assert found["redense-1"]["learning rate"] == "0.01"
    for phase in (dense, sparse, redense):
        row = found[phase.name]
        assert (row["test/accuracy"], row["eval/accuracy"]) == ("0.8750", f"{1 - 1 / phase.last_step:.4f}")
        assert (row["computed by"], row["fingerprint"], row["seconds"]) == ("this run", phase.fingerprint[:10], "1.5")
    assert f"complete, step 50 of 50; MLflow run {RUN_ID}" in page
    assert f"temper train {made.folder / 'job.yaml'}" in page
    assert f"torch {torch.__version__.split('+')[0]}" in page
    assert page.count("<figure>") == 4


def test_the_page_says_who_taught_and_what(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, undrawn: None) -> None:
    facts = replace(FACTS, outputs=(ModuleOutput("2", "ReLU", (32,), 1),))
    monkeypatch.setattr(probe, "_ask", lambda *_: json.loads(json.dumps(asdict(facts))))
    alone = {**JOB, "dsd": None, "storage": str(tmp_path / "runs")}
    for seed, name in enumerate(("wise", "grey")):
        (tmp_path / f"{name}.yaml").write_text(yaml.safe_dump({**alone, "name": name, "seed": seed}))
    distill = {
        "teacher": [{"source": "wise.yaml", "weight": 2}, "grey.yaml"],
        "temperature": {"start": 8, "end": 1},
        "loss": "decoupled",
        "features": [{"student": "2", "of": 1}],
    }
    plan = plan_job(build_job({**alone, "distill": distill}), local_cluster(), tmp_path)
    assert plan.distill is not None
    wise, grey = (teacher.fingerprint[:10] for teacher in plan.distill.teachers)
    plan.run_folder.mkdir(parents=True)
    (plan.run_folder / "job.yaml").write_text(job_to_yaml(plan.job))
    (plan.run_folder / "plan.json").write_text(json.dumps(plan.to_dict()))
    rows = [
        f"taught by</th><td>wise, {wise}, weight 2</td>",
        f"taught by</th><td>grey, {grey}, weight 1</td>",
        "soft targets</th><td>T 8 → 1 (linear), alpha 0.9, decoupled (non_target_weight 8)</td>",
        "level</th><td>2 32 → 2 of teacher 1 32, mse, weight 1</td>",
    ]
    page = build_page(plan.run_folder)
    assert [row for row in rows if row not in page] == [] and "teacher on the test split" not in page

    metrics = {"train/loss": 2.0, "teacher/accuracy": 0.9375, "teacher/loss": 0.25}
    folder = plan.phase_folder(plan.phases[0])
    folder.mkdir(parents=True)
    (folder / "history.jsonl").write_text(json.dumps({"step": 1, "time_ms": 0, "metrics": metrics}) + "\n")
    row = "teacher on the test split</th><td>accuracy 0.9375, loss 0.2500</td>"
    assert row in build_page(plan.run_folder)


def test_the_page_has_a_row_for_each_layer(made: Made, page: str) -> None:
    redense = phase_data(made)[2].weights
    assert redense is not None
    for name, title in (("1.weight", "1"), ("3.weight", "3")):
        layer = redense["layers"][name]
        share = 100 * layer["returned"]["above_threshold"] / layer["pruned"]
        row = cells(page, title)
        assert row[1:3] == [f"{layer['weights']:,}", {"1": "75 %", "3": "50 %"}[title]]
        assert row[3] == f"{layer['threshold']:.4g}"
        assert row[6] == f"{share:.4g} %"
    assert cells(page, "all of them")[1:3] == ["2,368", f"{100 * 1696 / 2368:.4g} %"]


def test_the_page_needs_nothing_beside_itself(page: str) -> None:
    parsed = Page(page)
    assert {"script", "link", "iframe", "object", "base"} & set(parsed.tags) == set()
    assert [link for link in parsed.loads if not link.startswith(("#", "data:image/png;base64,"))] == []
    assert re.findall(r"url\((?!#)|@import", page) == []
    assert "default-src 'none'" in page


def test_what_users_write_is_escaped(own: Made, undrawn: None) -> None:
    values = yaml.safe_load((own.folder / "job.yaml").read_text())
    values["data"]["augment"] = []
    values["tracking"]["uri"] = "http://me:hunter2@host/<script>alert(1)</script>"
    values["dsd"]["exclude"] = ["<b>&"]
    (own.folder / "job.yaml").write_text(yaml.safe_dump(values))
    page = build_page(own.folder)
    Page(page)
    assert escape("<script>alert(1)</script>") in page
    assert escape("<b>&") in page
    assert "<script" not in page and "<b>" not in page
    assert "hunter2" not in page


def test_a_run_that_reuses_a_phase_says_whose_it_is(own: Made, undrawn: None) -> None:
    computing = json.loads((own.phases["dense"] / "plan.json").read_text())
    (own.phases["dense"] / "plan.json").write_text(
        json.dumps({**computing, "run_folder": "/elsewhere/other-0123456789"})
    )
    page = build_page(own.folder)
    assert "reused from other-0123456789" in cells(page, "dense")
    assert "this run" in cells(page, "sparse-1")


def test_a_run_that_has_not_ended_is_shown_as_far_as_it_is(own: Made) -> None:
    (own.phases["sparse-1"] / "phase.json").unlink()
    (own.phases["sparse-1"] / "weights.json").unlink()
    shutil.rmtree(own.phases["redense-1"])
    page = build_page(own.folder)
    Page(page)
    assert "1 of 3 phases complete, step 40 of 50" in page
    assert "not complete" in cells(page, "sparse-1")
    assert page.count("<figure>") == 2


def test_a_job_of_one_phase_has_a_report_too(own: Made) -> None:
    plan = json.loads((own.folder / "plan.json").read_text())
    values = yaml.safe_load((own.folder / "job.yaml").read_text())
    (own.folder / "plan.json").write_text(json.dumps({**plan, "phases": plan["phases"][:1], "steps": 20}))
    (own.folder / "job.yaml").write_text(yaml.safe_dump({**values, "dsd": None}))
    page = build_page(own.folder)
    Page(page)
    assert "complete, step 20 of 20" in page
    assert page.count("<figure>") == 1
    assert "Round" not in page


Temper = Callable[..., tuple[int, str, str]]


@pytest.fixture
def run(capsys: pytest.CaptureFixture[str]) -> Temper:
    def call(*arguments: object) -> tuple[int, str, str]:
        code = main([str(argument) for argument in arguments])
        out, err = capsys.readouterr()
        return code, out, err

    return call


def test_the_command_writes_the_page_and_says_where(run: Temper, own: Made, undrawn: None, tmp_path: Path) -> None:
    code, out, err = run("report", RUN_ID, "--storage", own.folder.parent, "--json")
    assert (code, json.loads(out)) == (0, {"file": str(own.folder / "report.html")})
    assert err == f"report in {own.folder / 'report.html'}\n"
    page = (own.folder / "report.html").read_text()
    assert page.startswith("<!DOCTYPE html>")
    code, _, err = run("report", own.folder, "--to", tmp_path / "new" / "page.html")
    assert (code, err) == (0, f"report in {tmp_path / 'new' / 'page.html'}\n")
    assert (tmp_path / "new" / "page.html").read_text() == page


def test_the_command_refuses_what_is_no_run(run: Temper, own: Made, undrawn: None, tmp_path: Path) -> None:
    code, _, err = run("report", "nothing", "--storage", tmp_path)
    assert (code, err.splitlines()[1].split(" and ")[0]) == (2, "  RUN: nothing is no folder,")
    for folder in (tmp_path, own.phases["dense"]):
        code, _, err = run("report", folder)
        assert code == 2
        assert err.endswith(" is not a run's folder; give a run's id, or its folder in the storage\n")
    (tmp_path / "file").touch()
    code, _, err = run("report", own.folder, "--to", tmp_path / "file" / "page.html")
    assert (code, err.count("\n")) == (1, 1)


def test_plots_and_summaries_go_to_mlflow(made: Made, figures: dict[str, str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(report, "draw_figures", lambda phases: figures)
    logged: dict[str, str] = {}
    monkeypatch.setattr(report, "log_texts", lambda uri, run_id, texts: logged.update(texts))
    assert log_plots("sqlite:///x", RUN_ID, made.plan)
    plots = [f"plots/{name}.svg" for name in ("training", "sparsity", "weights-1", "returned-1")]
    assert list(logged) == [*plots, "weights/sparse-1.json", "weights/redense-1.json"]
    assert json.loads(logged["weights/sparse-1.json"]) == json.loads(
        (made.phases["sparse-1"] / "weights.json").read_text()
    )


def test_plots_that_fail_are_a_line_in_the_log(
    made: Made, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(report, "draw_figures", lambda phases: {"training": "<svg/>"})
    assert not log_plots("nonsense://x", RUN_ID, made.plan)
    assert "does not take plots/training.svg" in caplog.text
    monkeypatch.setattr(report, "draw_figures", lambda phases: 1 / 0)
    assert not log_plots("sqlite:///x", RUN_ID, made.plan)
    assert "no plots in MLflow: division by zero" in caplog.text
    assert f"`temper report {RUN_ID}` draws them" in caplog.text


def test_the_page_is_refused_where_there_is_no_run(tmp_path: Path) -> None:
    with pytest.raises(JobError, match="is not a run's folder"):
        write_report(tmp_path)


# ------------------------------------------------------------------------------------------------------------ export


def test_a_sparse_network_is_exported_with_its_masks(run: Temper, made: Made, tmp_path: Path) -> None:
    where = ["--storage", made.folder.parent, "--json"]
    code, out, err = run("export", RUN_ID, "--phase", "sparse-1", "--to", tmp_path / "out", *where)
    assert code == 0, err
    result = json.loads(out)
    assert (result["phase"], result["parameters"], result["pruned"]) == ("sparse-1", 2410, 1536 + 160)
    assert "2,410 parameters" in err and "1,696 of them pruned" in err
    weights, masks = (
        load_file(tmp_path / "out" / "model.safetensors"),
        load_file(tmp_path / "out" / "masks.safetensors"),
    )
    reader = CheckpointReader(made.phases["sparse-1"] / "checkpoints" / "step-00000040")
    assert list(masks) == ["1.weight", "3.weight"]
    for name, mask in masks.items():
        assert mask.dtype == torch.bool
        assert torch.equal(mask, reader.full(MASK, name))
        assert torch.equal(weights[name], reader.full(MASTER, name))
        assert bool((weights[name][~mask] == 0).all())
    card = (tmp_path / "out" / "README.md").read_text()
    assert "phase `sparse-1`" in card
    assert "| `1.weight` | 1,536 of 2,048 |" in card
    assert "| `3.weight` | 160 of 320 |" in card


def test_a_dense_phase_is_exported_without_masks(made: Made, tmp_path: Path) -> None:
    storage = made.folder.parent
    export_product(find_product(RUN_ID, storage, "sparse-1"), tmp_path)
    result = export_product(find_product(RUN_ID, storage), tmp_path)
    assert (result["phase"], result["pruned"]) == ("redense-1", 0)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["README.md", "job.yaml", "model.safetensors"]
    assert "Pruned" not in (tmp_path / "README.md").read_text()


def test_plain_pytorch_has_the_accuracy_of_the_checkpoint(run: Temper, made: Made, tmp_path: Path) -> None:
    found = {}
    for phase in ("dense", "sparse-1", "redense-1"):
        code, out, err = run("eval", RUN_ID, "--phase", phase, "--storage", made.folder.parent, "--json")
        assert code == 0, err
        found[phase] = json.loads(out)["metrics"]["test/accuracy"]
        export_product(find_product(RUN_ID, made.folder.parent, phase), tmp_path / phase)
        model = nn.Sequential(nn.Flatten(), nn.Linear(64, 32), nn.ReLU(), nn.Linear(32, 10))
        model.load_state_dict(load_file(tmp_path / phase / "model.safetensors"))
        assert accuracy(made.plan, model) == pytest.approx(found[phase], abs=1e-6)
    assert len(set(found.values())) == 3
    assert min(found.values()) > 0.6
    last = evaluate_product(find_product(RUN_ID, made.folder.parent))
    assert last["test/accuracy"] == found["redense-1"]


def accuracy(plan: Plan, model: nn.Module) -> float:
    split = load_split(plan.job.data, "test", Path(plan.job.storage), plan.data)
    right = total = 0
    for batch, valid in eval_batches(plan.job.data, split, plan.data, rank=0, world_size=1, batch=128):
        right += int((model(batch.inputs).argmax(1) == batch.targets)[:valid].sum())
        total += valid
    return right / total


@pytest.mark.parametrize(
    "build",
    [
        lambda weights: torch.optim.SGD(weights, lr=0.1, momentum=0.9, weight_decay=0.01),
        lambda weights: torch.optim.AdamW(weights, lr=0.01, weight_decay=0.1),
    ],
)
def test_the_card_says_how_to_train_on_without_pruned_weights(
    made: Made, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, build: Callable[..., torch.optim.Optimizer]
) -> None:
    export_product(find_product(RUN_ID, made.folder.parent, "sparse-1"), tmp_path)
    monkeypatch.chdir(tmp_path)
    model = nn.Sequential(nn.Flatten(), nn.Linear(64, 32), nn.ReLU(), nn.Linear(32, 10))
    names: dict[str, Any] = {"model": model}
    for block in re.findall(r"```python\n(.*?)```", (tmp_path / "README.md").read_text(), flags=re.DOTALL):
        exec(block, names)
    before = {name: weight.detach().clone() for name, weight in model.named_parameters()}
    optimizer = build(model.parameters())
    generator = torch.Generator().manual_seed(0)
    for _ in range(5):
        optimizer.zero_grad()
        inputs, targets = torch.randn(16, 64, generator=generator), torch.randint(10, (16,), generator=generator)
        nn.functional.cross_entropy(model(inputs), targets).backward()
        optimizer.step()
    for name, kept in load_file("masks.safetensors").items():
        weight = model.get_parameter(name)
        assert bool((weight[~kept] == 0).all())
        assert float((weight[kept] != before[name][kept]).float().mean()) > 0.5


def test_the_job_of_the_run_counts_where_another_computed_the_phase(own: Made, tmp_path: Path) -> None:
    values = yaml.safe_load((own.phases["dense"] / "job.yaml").read_text())
    (own.phases["dense"] / "job.yaml").write_text(yaml.safe_dump({**values, "name": "another"}))
    assert find_product(str(own.folder), tmp_path, "dense").job.name == "made"
    assert find_product(str(own.phases["dense"]), tmp_path).job.name == "another"


def test_a_phase_is_named_of_a_run_only(own: Made, tmp_path: Path) -> None:
    for folder in (own.phases["dense"], own.phases["dense"] / "checkpoints" / "step-00000020"):
        assert find_product(str(folder), tmp_path).phase == "dense"
        with pytest.raises(JobError, match=r"--phase: sparse-1 names a phase of a run, and .* is none; leave it out"):
            find_product(str(folder), tmp_path, "sparse-1")
