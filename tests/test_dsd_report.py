"""What is to be looked at of dense-sparse-dense training: the summary of the weights, its figures, and the export of a
sparse network with its masks."""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from safetensors.torch import load_file
from torch import Tensor, nn

from made_run import RUN_ID, Made, make_once, save
from temper.checkpoint import MASK, MASTER, CheckpointReader
from temper.cli import main
from temper.data.batches import eval_batches
from temper.data.sources import load_split
from temper.errors import JobError
from temper.export import evaluate_product, export_product, find_product
from temper.plan.build import Plan
from temper.plan.phases import PhasePlan, Pruning
from temper.techniques.dsd.histogram import BINS, LEVELS, widen
from temper.techniques.dsd.masks import select_mask
from temper.techniques.dsd.summary import summarize, write_summary
from temper.tracking.report.figure import figure_svg
from temper.tracking.report.run_data import PhaseData, Round, read_run, rounds, short_name
from temper.tracking.report.weight_figures import weight_figures

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


# ----------------------------------------------------------------------------------------------------------- figures


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Made:
    return make_once(tmp_path_factory.mktemp("made"))


@pytest.fixture
def own(made: Made, tmp_path: Path) -> Made:
    """A copy of the run that a test may change."""
    storage = tmp_path / "runs"
    shutil.copytree(made.folder.parent, storage)
    moved = {name: storage / "phases" / folder.name for name, folder in made.phases.items()}
    return Made(made.plan, storage / made.folder.name, moved)


@pytest.fixture(scope="module")
def phases(made: Made) -> list[PhaseData]:
    return list(read_run(made.folder).phases)


def texts_of(svg: str) -> list[str]:
    return re.findall(r"<text[^>]*>([^<]*)</text>", svg)


def test_every_figure_of_a_round_is_drawn_and_labelled(phases: list[PhaseData]) -> None:
    (item,) = rounds(phases)
    figures = weight_figures(item)
    assert [figure.name for figure in figures] == ["weights-1", "returned-1"]
    weights, returned = map(figure_svg, figures)
    for svg in (weights, returned):
        assert svg.startswith("<svg") and svg.endswith("</svg>\n")
    assert {"end of sparse-1", "end of redense-1", "all pruned layers", "75% zero", "50% zero"} <= set(
        texts_of(weights)
    )
    assert {"above the threshold", "threshold", "median", "1", "3"} <= set(texts_of(returned))
    assert [figure_svg(figure) for figure in figures] == [weights, returned]


def test_a_round_has_the_figures_that_it_has_come_to(phases: list[PhaseData]) -> None:
    dense, sparse, redense = phases

    def names(*parts: PhaseData) -> list[str]:
        return [figure.name for item in rounds([dense, *parts]) for figure in weight_figures(item)]

    assert names(sparse, replace(redense, weights=None)) == names(sparse) == ["weights-1"]
    assert names(replace(sparse, weights=None)) == []
    assert names(*(replace(phase, weights=summary_of_nothing(phase)) for phase in (sparse, redense))) == []


def summary_of_nothing(phase: PhaseData) -> dict[str, Any]:
    """Of a round that prunes nothing: the control with the same restarts."""
    assert phase.weights is not None
    return {"layers": {}, "total": {**phase.weights["total"], "weights": 0, "pruned": 0}}


def test_names_with_markup_and_dollars_are_only_text(phases: list[PhaseData]) -> None:
    dense, sparse, _ = phases
    assert sparse.weights is not None
    layers = {"<script>$x$&.weight" if name == "1.weight" else name: each for name, each in sparse.layers.items()}
    odd = replace(sparse, weights={**sparse.weights, "layers": layers})
    svg = figure_svg(weight_figures(Round(1, dense, odd, None))[0])
    assert "&lt;script&gt;$x$&amp;" in svg
    assert "<script" not in svg


def test_rounds_pair_the_phases(phases: list[PhaseData]) -> None:
    dense, sparse, redense = phases
    second = replace(sparse, plan={**sparse.plan, "name": "sparse-2"})
    found = rounds([dense, sparse, redense, second])
    assert [(item.number, item.before.name, item.sparse.name) for item in found] == [
        (1, "dense", "sparse-1"),
        (2, "redense-1", "sparse-2"),
    ]
    assert [item.redense and item.redense.name for item in found] == ["redense-1", None]
    assert rounds([dense]) == []


def test_a_long_name_keeps_both_ends() -> None:
    assert short_name("layer1.0.conv1.weight") == "layer1.0.conv1"
    assert short_name("abcdefghij.klmnop.weight", 9) == "abcd…mnop"
    assert short_name("rnn.weight_ih_l0") == "rnn.weight_ih_l0"


Temper = Callable[..., tuple[int, str, str]]


@pytest.fixture
def run(capsys: pytest.CaptureFixture[str]) -> Temper:
    def call(*arguments: object) -> tuple[int, str, str]:
        code = main([str(argument) for argument in arguments])
        out, err = capsys.readouterr()
        return code, out, err

    return call


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
