"""What the README says is so: its tree, its commands, its links, its tables, and the first own job."""

from __future__ import annotations

import fnmatch
import re
import shlex
import tomllib
from pathlib import Path

import pytest
import yaml

from temper import cli, errors
from temper.config.compose import compose_table
from temper.config.load import load_job
from temper.config.schema import DistillConfig, DSDConfig
from temper.data import sources
from temper.models import build as models
from temper.plan.build import build_plan
from temper.plan.mesh import ClusterShape

ROOT = Path(__file__).parent.parent
README = (ROOT / "README.md").read_text()
TWO_CORES = ClusterShape(nodes=1, cpus=2.0, gpus=0.0)


def blocks(language: str, text: str = README) -> list[str]:
    """The code blocks of a language."""
    return re.findall(rf"^```{language}\n(.*?)^```$", text, flags=re.DOTALL | re.MULTILINE)


def shell_lines(program: str) -> list[str]:
    """Lines of the shell blocks that call `program`."""
    return [line for block in blocks("sh") for line in block.splitlines() if f"{line} ".startswith(f"{program} ")]


def section(title: str) -> str:
    return README.split(f"\n## {title}\n")[1].split("\n## ")[0]


# ------------------------------------------------------------------------------------------------------------- tree


def tree() -> list[str]:
    """Paths of the tree in its order, e.g. `jobs/` and `platform/temper/cli.py`."""
    (block,) = re.findall(r"^```text\n(.*?)^```$", section("The tree"), flags=re.DOTALL | re.MULTILINE)
    paths, above = [], []
    for line in block.splitlines():
        name = line.split()[0]
        depth = (len(line) - len(line.lstrip())) // 2
        above = [*above[:depth], name]
        paths.append("".join(above))
    return paths


def listing(folder: Path) -> set[str]:
    """What a fresh clone has in `folder`: nothing that git ignores, and of what is hidden only CI's folder."""
    ignored = [line.rstrip("/") for line in (ROOT / ".gitignore").read_text().splitlines()]
    return {
        f"{entry.relative_to(ROOT)}/" if entry.is_dir() else str(entry.relative_to(ROOT))
        for entry in folder.iterdir()
        if (not entry.name.startswith(".") or entry.name == ".ci")
        and not any(fnmatch.fnmatch(entry.name, pattern) for pattern in ignored)
    }


def test_the_tree_is_the_listing() -> None:
    expected = listing(ROOT) | listing(ROOT / "platform") | listing(ROOT / "platform" / "temper")
    assert len(tree()) == len(set(tree()))
    assert set(tree()) == expected


def test_every_line_of_the_tree_says_something() -> None:
    (block,) = re.findall(r"^```text\n(.*?)^```$", section("The tree"), flags=re.DOTALL | re.MULTILINE)
    assert [line for line in block.splitlines() if len(line.split()) < 2 and line.strip() != "temper/"] == []


def test_the_tree_has_the_order_of_the_layers() -> None:
    """Which the README says: a part imports only what is below it."""
    tool = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]
    layers = tool["importlinter"]["contracts"][0]["layers"]
    layer_of = {name: number for number, layer in enumerate(layers) for name in layer.split(" | ")}
    names = [Path(path).name.removesuffix(".py") for path in tree() if path.startswith("platform/temper/")]
    found = [layer_of[name] for name in names if name in layer_of]
    assert len(found) == len(layer_of)
    assert found == sorted(found)


# --------------------------------------------------------------------------------------------------------- commands


@pytest.mark.parametrize("line", shell_lines("temper"))
def test_every_command_is_understood(line: str) -> None:
    arguments = shlex.split(line, comments=True)[1:]
    assert cli._parser().parse_args(arguments).command == arguments[0]


def test_the_table_of_commands_is_complete() -> None:
    named = re.findall(r"^\| `temper (\w+)", section("Commands"), flags=re.MULTILINE)
    described = re.findall(r"^    (\w+) ", cli._parser().format_help(), flags=re.MULTILINE)
    assert sorted(named) == sorted(described)


def test_every_option_exists(capsys: pytest.CaptureFixture[str]) -> None:
    for name in re.findall(r"^    (\w+) ", cli._parser().format_help(), flags=re.MULTILINE):
        assert cli.main([name, "--help"]) == 0
    known = set(re.findall(r"--[a-z][a-z-]*", capsys.readouterr().out))
    named = {
        option for part in ("Commands", "A first own job") for option in re.findall(r"--[a-z][a-z-]*", section(part))
    }
    assert named - known == set()


def test_exit_codes() -> None:
    named = re.findall(r"^\| (\d+) \|", section("Commands"), flags=re.MULTILINE)
    codes = [value for name, value in vars(errors).items() if name.startswith("EXIT_")]
    assert sorted(map(int, named)) == sorted(codes)


def test_every_target_of_make_exists() -> None:
    targets = set(re.findall(r"^([a-z-]+):", (ROOT / "Makefile").read_text(), flags=re.MULTILINE))
    named = {line.split()[1] for line in shell_lines("make")} | set(re.findall(r"`make ([a-z-]+)`", README))
    assert {"install", "demo", "test"} <= named <= targets


def test_every_script_exists() -> None:
    for line in shell_lines("python"):
        script = line.split()[1]
        if script == "-m":
            script = f"platform/{line.split()[2].replace('.', '/')}.py"
        assert (ROOT / script).is_file(), script


# ------------------------------------------------------------------------------------------------- links and tables


def test_every_link_and_picture_exists() -> None:
    targets = re.findall(r"\]\(([^)\s]+)\)", README)
    local = [target for target in targets if "://" not in target and not target.startswith("#")]
    pictures = ("terminal.svg", "mlflow_tree.png", "mlflow_trial.png", "report_light.png", "report_dark.png")
    assert {f"docs/{name}" for name in pictures} <= set(local)
    assert [target for target in local if not (ROOT / target).is_file()] == []
    titles = {f"#{title.lower().replace(' ', '-')}" for title in re.findall(r"^##+ (.+)$", README, flags=re.MULTILINE)}
    assert {target for target in targets if target.startswith("#")} <= titles


def test_lines_are_no_longer_than_in_the_code() -> None:
    # A table's row cannot be broken.
    assert [line for line in README.splitlines() if len(line) > 120 and not line.startswith("|")] == []


@pytest.mark.parametrize(
    ("title", "kinds"), [("Data", set(sources.KINDS)), ("Models", set(models.KINDS))], ids=["data", "models"]
)
def test_every_kind_is_in_its_table(title: str, kinds: set[str]) -> None:
    cells = re.findall(r"^\| (`.*?`) \|", section(title), flags=re.MULTILINE)
    assert {name for cell in cells for name in re.findall(r"`(\w+)`", cell)} - {"kind"} == kinds


# ---------------------------------------------------------------------------------------------------- the first job


def test_the_first_own_job_can_be_planned(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    own = section("A first own job")
    (model,), (job,) = blocks("python", own), blocks("yaml", own)
    assert len([line for line in (model + job).splitlines() if line.strip()]) <= 20
    (tmp_path / "mynet.py").write_text(model)
    (tmp_path / "mynet.yaml").write_text(job)
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    plan = build_plan(load_job("mynet.yaml"), TWO_CORES, tmp_path)
    assert plan.model.output_shape == (10,)
    assert plan.model.num_parameters == 9 * 16 + 16 + 2 * 16 + (16 * 64 + 1) * 10
    assert (plan.mesh.data, plan.batch.rank_batch, plan.data.validation_examples) == (2, 32, 200)
    overrides = [line for line in shell_lines("temper train") if "=" in line.split("#")[0]]
    for line in overrides:
        changed = load_job("mynet.yaml", shlex.split(line, comments=True)[3:])
        assert changed != plan.job


def test_the_distillation_shown_is_legal() -> None:
    shown = DistillConfig.model_validate(yaml.safe_load(blocks("yaml")[1])["distill"])
    assert [pair.loss for pair in shown.features] == ["mse", "attention_transfer"]
    assert shown.cache == "features"


def test_the_space_shown_is_a_shipped_one() -> None:
    shipped = (ROOT / "tune_spaces" / "temperature_sparsity.yaml").read_text()
    assert yaml.safe_load(blocks("yaml")[3]) == yaml.safe_load(shipped)


def test_every_shipped_space_is_in_its_table() -> None:
    linked = re.findall(r"^\| \[(tune_spaces/\w+\.yaml)\]", section("Sweeps"), flags=re.MULTILINE)
    assert sorted(linked) == sorted(str(path.relative_to(ROOT)) for path in (ROOT / "tune_spaces").glob("*.yaml"))


def test_the_rounds_shown_are_legal() -> None:
    shown = yaml.safe_load(blocks("yaml")[2])
    assert [round_.sparsity for round_ in DSDConfig.model_validate(shown["dsd"]).rounds] == [
        0.5,
        {"rnn.*": 0.25, "fc": 0.4},
    ]


def test_the_table_of_what_composes_is_that_of_the_rules() -> None:
    assert f"\n\n{compose_table()}\n\n" in README
