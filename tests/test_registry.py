"""Registered models: what MLflow loads and serves without temper, what a version tells, and who becomes champion."""

from __future__ import annotations

import contextlib
import json
import math
import os
import signal
import socket
import subprocess
import sys
import threading
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from typing import Any

import mlflow
import numpy as np
import pytest
import torch
from mlflow import MlflowClient
from mlflow.entities import Metric

from temper.checkpoint import BUFFER, MASK, MASTER, Shard, checkpoint_folder, write_manifest, write_shards
from temper.config.schema import JobConfig
from temper.config.space import Objective
from temper.data.batches import normalized
from temper.errors import RunError
from temper.export import Product, build_servable, export_product, load_model
from temper.files import describe_file, write_json
from temper.launch import champion
from temper.launch.champion import CHAMPION, job_objective, offer_champion
from temper.launch.lineage import lineage_text, teacher_lineage
from temper.launch.registering import Registered, register_product
from temper.models.build import build_model
from temper.outputs import logits_of
from temper.plan.facts import data_facts
from temper.products import is_export
from temper.run_folder import JOB, RUN
from temper.tracking import registry
from temper.tracking.mlflow_store import build_client

SOURCE = Path(__file__).parents[1] / "platform"
DIGITS = {"kind": "digits", "global_batch": 64}
PICTURES = {
    "kind": "python",
    "target": "sets_of_registry:pictures",
    "global_batch": 2,
    "train_examples": 4,
    "test_examples": 4,
    "shape": [3, 32, 32],
    "num_classes": 5,
    "normalize": {"mean": [0.4, 0.5, 0.6], "std": [0.2, 0.3, 0.4]},
}
TEXTS = {
    "kind": "python",
    "target": "sets_of_registry:texts",
    "global_batch": 2,
    "train_examples": 4,
    "test_examples": 4,
    "shape": [12],
    "num_classes": 13,
}
SMALL = {"hidden_size": 8, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 8}
MODULES = {
    "sets_of_registry": """
import numpy as np


def pictures(split):
    numbers = np.random.default_rng(1)
    return [(numbers.integers(0, 256, (3, 32, 32), dtype=np.uint8), index) for index in range(4)]


def texts(split):
    numbers = np.random.default_rng(2)
    return [(numbers.integers(0, 13, 12), numbers.integers(0, 13, 12)) for _ in range(4)]
""",
    "nets_of_registry": """
from torch import nn


class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.layer = nn.Linear(64, 10)

    def forward(self, x):
        return self.layer(x.flatten(1)).tanh()


class Undecided(Net):
    def forward(self, x):
        return super().forward(x) if x.mean() > 0 else super().forward(-x)


class CountsExamples(Net):
    def forward(self, x):
        return super().forward(x) * (2.0 if len(x) == 2 else 1.0)
""",
}
KINDS: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    "mlp": ({"kind": "mlp", "hidden": [8], "dropout": 0.5}, DIGITS),
    "cnn": ({"kind": "cnn", "channels": [4], "hidden": 8}, DIGITS),
    "resnet": ({"kind": "resnet", "depth": 8}, PICTURES),
    "torchvision": ({"kind": "torchvision", "name": "squeezenet1_1"}, PICTURES),
    "gpt": ({"kind": "gpt", "layers": 1, "heads": 2, "width": 8}, TEXTS),
    "transformers": (
        {
            "kind": "transformers",
            "auto_class": "AutoModelForImageClassification",
            "model_type": "vit",
            "args": {**SMALL, "patch_size": 8},
        },
        PICTURES,
    ),
    "python": ({"kind": "python", "target": "nets_of_registry:Net"}, DIGITS),
}
BATCHES = (1, 3, 7)

# Loads every model in a process that has no temper, and gives what each says of the inputs it is handed.
STRANGER = """
import json, sys
sys.path = [folder for folder in sys.path if not folder.endswith("platform")]
class Forbidden:
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] in ("temper", "deepspeed", "ray"):
            raise ImportError(f"{name} is forbidden here")
sys.meta_path.insert(0, Forbidden())
import mlflow.pyfunc, mlflow.pytorch, numpy as np, torch
mlflow.set_tracking_uri(sys.argv[1])
uris = json.loads(sys.argv[2])
for kind, uri in uris.items():
    inputs, outputs = dict(np.load(f"{sys.argv[3]}/{kind}.npz")), {}
    model, network = mlflow.pyfunc.load_model(uri), mlflow.pytorch.load_model(uri)
    for name, batch in inputs.items():
        outputs[f"pyfunc {name}"] = model.predict(batch)
        outputs[f"pytorch {name}"] = network(torch.from_numpy(batch)).detach().numpy()
    np.savez(f"{sys.argv[3]}/{kind}.outputs.npz", **outputs)
"""


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """The working folder of all tests here, with the modules of `kind: python` targets and a storage `runs`."""
    folder = tmp_path_factory.mktemp("place")
    for name, text in MODULES.items():
        (folder / f"{name}.py").write_text(text)
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        patch.delenv("MLFLOW_TRACKING_URI", raising=False)
        yield folder


@pytest.fixture(scope="module")
def store(place: Path) -> str:
    """A SQLite store, as a run makes one in its storage."""
    uri = f"sqlite:///{place}/runs/mlflow.db"
    build_client(uri).create_experiment("models", artifact_location=str(place / "runs" / "artifacts"))
    return uri


def make_product(
    place: Path, uri: str, model: dict[str, Any], data: dict[str, Any], *, metrics: dict[str, float], masked: str = ""
) -> Product:
    """What a run ended with, whose MLflow run has its last metrics; half of the weight `masked` is pruned."""
    sections = {"name": "job", "model": model, "data": data, "optimizer": {"kind": "sgd", "lr": 0.1}}
    job = JobConfig.model_validate({**sections, "budget": {"steps": 30}, "storage": str(place / "runs")})
    client = build_client(uri)
    experiment = client.get_experiment_by_name("models")
    assert experiment is not None
    run_id = client.create_run(experiment.experiment_id).info.run_id
    client.log_batch(run_id, [Metric(name, value, 1000, 30) for name, value in metrics.items()])

    network = build_model(job.model, data_facts(job.data, place), 0)
    tensors = {name: {MASTER: value.detach().reshape(-1)} for name, value in network.named_parameters()}
    tensors |= {name: {BUFFER: value.reshape(-1)} for name, value in network.named_buffers()}
    if masked:
        tensors[masked][MASK] = torch.arange(tensors[masked][MASTER].numel()) % 2 == 0
    checkpoint = checkpoint_folder(place / "runs" / "phases" / run_id / "checkpoints", 30)
    write_shards(checkpoint, 0, [Shard(name, 0, kinds) for name, kinds in tensors.items()])
    shapes = {name: tuple(value.shape) for name, value in network.state_dict().items()}
    write_manifest(checkpoint, 1, {"step": 30, "engine": {}}, shapes, [])
    num_parameters = sum(param.numel() for param in network.parameters())
    plan = {"model": {"num_parameters": num_parameters}, "import_folders": [str(place)]}
    phase = "sparse-1" if masked else "dense"
    return Product(job, phase, f"{run_id[:8]}fingerprint", checkpoint, metrics, plan, {"uri": uri, "run_id": run_id})


def register(product: Product, to: Path, name: str, *more: Any) -> Registered:
    export_product(product, to)
    return register_product(product, to, name, *more)


def version_of(uri: str, registered: Registered) -> Any:
    name, version = registered.uri.removeprefix("models:/").split("/")
    return MlflowClient(uri).get_model_version(name, version)


# ------------------------------------------------------------------------------------------------- loaded by a stranger


def batches_of(product: Product) -> dict[str, np.ndarray]:
    """Inputs of every size that is asked for, made of the product's own examples; texts are also shorter."""
    servable = build_servable(product)
    batches = {}
    for count in BATCHES:
        rows = torch.arange(count) % len(servable.inputs)
        inputs = servable.inputs[rows].flip(-1)
        batches[str(count)] = inputs.numpy()
        if servable.free == (0, 1):
            batches[f"{count} short"] = inputs[:, :5].numpy()
    return batches


def outputs_of(product: Product, inputs: np.ndarray) -> np.ndarray:
    """What the network itself says of inputs that are scaled and normalised as in training."""
    network, facts = load_model(product)
    with torch.no_grad():
        return logits_of(network(normalized(torch.from_numpy(inputs), facts))).numpy()


@pytest.fixture(scope="module")
def loaded(place: Path, store: str, tmp_path_factory: pytest.TempPathFactory) -> dict[str, tuple[Product, Registered]]:
    """A version of every kind of model; what a process without temper makes of it lies beside its export."""
    versions = {}
    for kind, (model, data) in KINDS.items():
        product = make_product(place, store, model, data, metrics={"test/accuracy": 0.5, "eval/loss": 1.0})
        versions[kind] = product, register(product, place / "out" / kind, f"every {kind}")
        np.savez(place / "out" / f"{kind}.npz", **batches_of(product))
    uris = {kind: registered.uri for kind, (_, registered) in versions.items()}
    words = [sys.executable, "-c", STRANGER, store, json.dumps(uris), str(place / "out")]
    elsewhere = tmp_path_factory.mktemp("elsewhere")
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    done = subprocess.run(words, cwd=elsewhere, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert list(elsewhere.iterdir()) == []
    return versions


@pytest.mark.parametrize("kind", KINDS)
def test_a_process_without_temper_computes_the_same(
    kind: str, loaded: dict[str, tuple[Product, Registered]], place: Path
) -> None:
    product, _ = loaded[kind]
    inputs, outputs = (dict(np.load(place / "out" / f"{kind}{end}.npz")) for end in ("", ".outputs"))
    assert len(outputs) == 2 * len(inputs) >= 2 * len(BATCHES)
    for name, batch in inputs.items():
        expected = outputs_of(product, batch)
        assert np.abs(expected).max() > 1e-3
        for loader in ("pyfunc", "pytorch"):
            np.testing.assert_allclose(outputs[f"{loader} {name}"], expected, rtol=0, atol=1e-6)


SIGNATURES = {
    "mlp": ("float32", (-1, 1, 8, 8), (-1, 10)),
    "resnet": ("uint8", (-1, 3, 32, 32), (-1, 5)),
    "gpt": ("int64", (-1, -1), (-1, -1, 13)),
}


@pytest.mark.parametrize("kind", SIGNATURES)
def test_the_signature_says_what_users_have(
    kind: str, loaded: dict[str, tuple[Product, Registered]], store: str
) -> None:
    _, registered = loaded[kind]
    source = version_of(store, registered).source
    info = mlflow.models.Model.load(source)
    (given,), (answered,) = info.signature.inputs.inputs, info.signature.outputs.inputs
    assert (str(given.type), given.shape, answered.shape) == SIGNATURES[kind]
    assert info.flavors["python_function"]["config"] == {"device": "cpu"}
    requirements = (Path(source) / "requirements.txt").read_text().split()
    assert [line.split("==")[0] for line in requirements] == ["torch", "mlflow"]
    model = mlflow.pyfunc.load_model(source)
    assert len(model.predict(model.input_example)) == 2


def test_what_has_not_the_type_of_pixels_is_refused(loaded: dict[str, tuple[Product, Registered]], store: str) -> None:
    model = mlflow.pyfunc.load_model(version_of(store, loaded["resnet"][1]).source)
    with pytest.raises(mlflow.exceptions.MlflowException, match="dtype of input float32 does not match expected"):
        model.predict(np.zeros((1, 3, 32, 32), np.float32))


# -------------------------------------------------------------------------------------------------- what a version says


def test_a_version_tells_where_it_came_from(loaded: dict[str, tuple[Product, Registered]], store: str) -> None:
    product, registered = loaded["mlp"]
    run_id = product.run["run_id"]
    client, version = MlflowClient(store), version_of(store, registered)
    num_parameters = 64 * 8 + 8 + 8 * 10 + 10
    assert version.tags == {
        "temper.fingerprint": product.fingerprint,
        "temper.phase": "dense",
        "temper.checkpoint": "step-00000030",
        "temper.run_id": run_id,
        "temper.job": "job",
        "temper.parameters": str(num_parameters),
        "temper.metric.eval/loss": "1.0",
        "temper.metric.test/accuracy": "0.5",
        "temper.loadable": "true",
    }
    assert (version.run_id, registered.alias, registered.is_champion) == (run_id, CHAMPION, True)
    assert version.description.startswith("# job\n\nTrained by temper: phase `dense`")
    assert "Takes values as the data set has them (of images from 0 to 1), float32, of the shape" in version.description
    assert version.description.endswith(f"/runs/{run_id})")
    assert "## Use" not in version.description
    files = {file.name for file in Path(version.source).iterdir()}
    assert {"MLmodel", "data", "model.safetensors", "job.yaml", "README.md"} <= files
    assert not list(Path(version.source).rglob("*.pkl")) and is_export(Path(version.source))
    assert 'mlflow models serve -m "models:/every mlp/VERSION"' in (Path(version.source) / "README.md").read_text()

    run = client.get_run(run_id)
    (output,) = run.outputs.model_outputs
    logged = client.get_logged_model(output.model_id)
    assert (logged.name, str(logged.status), output.step) == ("job dense", "READY", 30)
    assert json.loads(logged.tags.pop("mlflow.modelVersions")) == [{"name": "every mlp", "version": "1"}]
    assert logged.tags == version.tags
    assert {metric.key: metric.value for metric in logged.metrics} == {"test/accuracy": 0.5, "eval/loss": 1.0}
    assert len(client.get_metric_history(run_id, "test/accuracy")) == 1


def test_a_sparse_phase_tells_of_its_masks(place: Path, store: str) -> None:
    product = make_product(place, store, *KINDS["mlp"], metrics={"test/accuracy": 0.4}, masked="1.weight")
    version = version_of(store, register(product, place / "sparse", "sparse", "tiny"))
    digest = describe_file(place / "sparse" / "masks.safetensors")["sha256"]
    assert (version.tags["temper.pruned"], version.tags["temper.phase"]) == (str(64 * 8 // 2), "sparse-1")
    assert version.tags["temper.masks"] == f"masks.safetensors sha256:{digest}"
    assert (Path(version.source) / "masks.safetensors").is_file() and list(version.aliases) == ["tiny"]


def test_the_same_checkpoint_is_registered_once(
    loaded: dict[str, tuple[Product, Registered]], place: Path, store: str
) -> None:
    product, first = loaded["cnn"]
    before = sorted((place / "runs" / "artifacts" / "models").iterdir())
    again = register_product(product, place / "out" / "cnn", "every cnn")
    assert (again.uri, again.alias, again.note) == (first.uri, CHAMPION, "it is the champion already")
    assert register_product(product, place / "out" / "cnn", "every cnn", "mine").uri == first.uri
    assert sorted((place / "runs" / "artifacts" / "models").iterdir()) == before
    assert set(version_of(store, first).aliases) == {CHAMPION, "mine"}
    assert register_product(product, place / "out" / "cnn", "another name").uri == "models:/another name/1"


@pytest.mark.parametrize("net", ["Undecided", "CountsExamples"])
def test_what_torch_export_cannot_do_is_registered_and_said(place: Path, store: str, tmp_path: Path, net: str) -> None:
    """A network whose code depends on values, or on how many examples there are, is no graph."""
    model = {"kind": "python", "target": f"nets_of_registry:{net}"}
    product = make_product(place, store, model, DIGITS, metrics={"test/accuracy": 0.5})
    registered = register(product, place / net, net)
    assert registered.note.startswith("Only temper can load it: torch.export makes no graph of it: ")
    version = version_of(store, registered)
    assert version.tags["temper.loadable"] == "false" and "Only temper can load it" in version.description
    found = registry.download_version(store, net, "1", tmp_path)
    assert found is not None and is_export(found)
    assert {file.name for file in found.iterdir()} == {"model.safetensors", "job.yaml", "README.md"}


def test_without_the_data_there_is_no_example_and_no_graph(
    place: Path, store: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    product = make_product(place, store, *KINDS["resnet"], metrics={"test/accuracy": 0.5})
    monkeypatch.setattr("sets_of_registry.pictures", lambda split: (_ for _ in ()).throw(OSError("gone")))
    registered = register(product, place / "gone", "gone")
    said = "Only temper can load it: the test split cannot be read: "
    assert registered.is_champion and registered.note.startswith(said) and "gone" in registered.note


def test_an_upload_that_fails_is_no_version(place: Path, store: str, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(self: MlflowClient, model_id: str, folder: str) -> None:
        raise OSError("no space left on device")

    product = make_product(place, store, *KINDS["mlp"], metrics={"test/accuracy": 0.5})
    monkeypatch.setattr(MlflowClient, "log_model_artifacts", refuse)
    with pytest.raises(RunError, match="no space left on device"):
        register(product, place / "broken", "broken")
    client, run_id = MlflowClient(store), product.run["run_id"]
    (failed,) = client.search_logged_models(["1"], filter_string=f"source_run_id = '{run_id}'")
    assert str(failed.status) == "FAILED" and client.search_model_versions("name = 'broken'") == []
    assert registry.download_run_export(store, run_id, "dense", place / "runs") is None


def test_no_secret_is_registered(place: Path, store: str) -> None:
    product = make_product(place, store, *KINDS["mlp"], metrics={"test/accuracy": 0.5})
    tracking = product.job.tracking.model_copy(update={"uri": "postgresql://me:hunter2@host/db"})
    product = replace(product, job=product.job.model_copy(update={"tracking": tracking, "name": "token=hunter2"}))
    version = version_of(store, register(product, place / "secret", "secret"))
    texts = [file.read_text() for name in (JOB, "README.md", "MLmodel") for file in Path(version.source).glob(name)]
    assert len(texts) == 3 and "hunter2" not in "".join([*texts, version.description])


# -------------------------------------------------------------------------------------------------------- the champion

MOST = Objective(metric="test/accuracy", mode="max")
LEAST = Objective(metric="test/accuracy", mode="min")


def test_the_champion_is_replaced_by_a_better_one_only(place: Path, store: str) -> None:
    client = build_client(store)
    client.create_registered_model("contest")

    def offer(value: float | None, objective: Objective = MOST) -> tuple[bool, str]:
        tags = {} if value is None else {"temper.metric.test/accuracy": repr(value)}
        version = client.create_model_version("contest", str(place), tags=tags)
        return offer_champion(store, "contest", str(version.version), objective)

    assert offer(None) == (False, "it does not become champion: it has no finite test/accuracy")
    assert offer(math.nan) == (False, "it does not become champion: it has no finite test/accuracy")
    assert offer(0.5) == (True, "it is the first champion: test/accuracy 0.5")
    assert offer(0.5) == (False, "version 3 stays champion: test/accuracy 0.5 is not better than its 0.5")
    assert offer(0.6) == (True, "it is the champion: test/accuracy 0.6 is better than 0.5 of version 3")
    assert offer(0.1)[0] is False and offer(math.inf)[0] is False
    assert offer(0.1, LEAST) == (True, "it is the champion: test/accuracy 0.1 is better than 0.6 of version 5")
    client.set_registered_model_alias("contest", CHAMPION, "1")
    assert offer(0.9) == (False, "version 1 stays champion: it has no test/accuracy to compare with")
    assert registry.resolve_alias(store, "contest", CHAMPION) == "1"


def test_of_two_versions_that_are_offered_at_once_the_better_one_is_champion(
    place: Path, store: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Both have looked at the champion before either of them becomes it, as on two machines."""
    client = build_client(store)
    client.create_registered_model("race")

    def version_with(value: float) -> str:
        tags = {"temper.metric.test/accuracy": repr(value)}
        return str(client.create_model_version("race", str(place), tags=tags).version)

    assert offer_champion(store, "race", version_with(0.9), MOST)[0]
    better, worse = version_with(0.99), version_with(0.95)
    told = []

    def overtaken(uri: str, name: str, alias: str, version: str) -> None:
        if not told:
            told.append("the other")
            told.append(champion._offer(uri, name, better, MOST))
        registry.set_alias(uri, name, alias, version)

    monkeypatch.setattr(champion, "set_alias", overtaken)
    assert offer_champion(store, "race", worse, MOST) == (False, f"version {better} has become champion meanwhile")
    assert told[1][0] is True
    assert registry.resolve_alias(store, "race", CHAMPION) == better

    # One that was given up is no rival of what comes much later.
    monkeypatch.setattr(champion, "_SAME_TIME_S", -1.0)
    monkeypatch.setattr(champion, "set_alias", registry.set_alias)
    client.set_registered_model_alias("race", CHAMPION, "1")
    assert offer_champion(store, "race", worse, MOST)[0]
    assert registry.resolve_alias(store, "race", CHAMPION) == worse


def test_offers_on_one_machine_wait_for_each_other(store: str, monkeypatch: pytest.MonkeyPatch) -> None:
    values, state = {"1": 0.9, "2": 0.99, "3": 0.95}, {CHAMPION: "1"}
    tags = {version: {"temper.metric.test/accuracy": repr(value)} for version, value in values.items()}
    looked = threading.Barrier(2)

    def resolve_alias(uri: str, name: str, alias: str) -> str:
        found = state[alias]
        with contextlib.suppress(threading.BrokenBarrierError):
            looked.wait(0.2)  # both get here at once only where they do not wait
        return found

    monkeypatch.setattr(champion, "resolve_alias", resolve_alias)
    monkeypatch.setattr(champion, "version_tags", lambda uri, name, version: tags[version])
    monkeypatch.setattr(champion, "versions_beside", lambda *_: {})
    monkeypatch.setattr(champion, "set_alias", lambda uri, name, alias, version: state.update({alias: version}))
    with ThreadPoolExecutor() as threads:
        list(threads.map(lambda version: offer_champion(store, "threads", version, MOST), ("2", "3")))
    assert state == {CHAMPION: "2"} and looked.broken


@pytest.mark.parametrize(
    ("metrics", "objective"),
    [
        (["accuracy", "f1"], ("test/accuracy", "max")),
        (["calibration_error", "accuracy"], ("test/calibration_error", "min")),
        (["mae"], ("test/mae", "min")),
        ([], ("test/loss", "min")),
    ],
)
def test_a_job_is_compared_by_its_first_metric(metrics: list[str], objective: tuple[str, str]) -> None:
    job = JobConfig.model_validate(
        {
            "name": "job",
            "model": {"kind": "mlp"},
            "data": DIGITS,
            "optimizer": {"kind": "sgd", "lr": 0.1},
            "budget": {"steps": 1},
            "evaluation": {"metrics": metrics},
        }
    )
    assert (job_objective(job).metric, job_objective(job).mode) == objective


# -------------------------------------------------------------------------------------------------------- the teachers


def test_the_lineage_goes_back_to_the_first_teacher(place: Path, store: str) -> None:
    """A student of a phase, of a registered version that was taught itself, and of a run that only MLflow has."""
    client = build_client(store)
    client.create_registered_model("wise one")
    old = [{"name": "older", "fingerprint": "o" * 64}]
    client.create_model_version(
        "wise one", str(place), tags={"temper.run_id": "f" * 32, "temper.teacher": json.dumps(old)}
    )
    phase = place / "runs" / "phases" / ("a" * 64)
    run_folder = place / "runs" / "taught-0123"
    grand = {"name": "grand", "fingerprint": "g" * 64, "kind": "weights", "source": "w.safetensors", "place": ""}
    phase.mkdir(parents=True)
    run_folder.mkdir()
    plan = {"run_folder": str(run_folder), "job": {"storage": str(place / "runs")}, "distill": {"teachers": [grand]}}
    write_json(phase / "plan.json", plan)
    write_json(run_folder / RUN, {"run_id": "e" * 32})
    teachers = [
        {"name": "taught", "fingerprint": "a" * 64, "kind": "phase", "source": "taught.yaml", "place": str(phase)},
        {"name": "wise one/1", "fingerprint": "b" * 64, "kind": "weights", "source": "models:/wise one/1", "place": ""},
        {"name": "run", "fingerprint": "c" * 64, "kind": "weights", "source": f"runs:/{'d' * 32}", "place": ""},
    ]  # fmt: skip
    lineage = teacher_lineage({"distill": {"teachers": teachers}}, store)
    assert lineage == [
        {
            "name": "taught",
            "fingerprint": "a" * 64,
            "run_id": "e" * 32,
            "teachers": [{"name": "grand", "fingerprint": "g" * 64}],
        },
        {
            "name": "wise one/1",
            "fingerprint": "b" * 64,
            "version": "models:/wise one/1",
            "run_id": "f" * 32,
            "teachers": old,
        },
        {"name": "run", "fingerprint": "c" * 64, "run_id": "d" * 32},
    ]
    assert teacher_lineage({"distill": None}, store) == []
    crowd = {"distill": {"teachers": [{**teachers[0], "name": "x" * 100}] * 18}}
    short = json.loads(lineage_text(crowd, store))
    assert len(short) == 18 and "teachers" not in short[0] and short[0]["run_id"] == "e" * 32


# ----------------------------------------------------------------------------------------- a real server, and a service


@contextlib.contextmanager
def serving(words: list[str], port: int, **environment: str) -> Iterator[str]:
    """A process group that answers at `/health` of the port; its address. Its end ends the group."""
    folder = Path(environment.pop("folder"))
    with (folder / f"{port}.log").open("w") as log:
        process = subprocess.Popen(
            [sys.executable, "-m", "mlflow", *words, "--host", "127.0.0.1", "--port", str(port)],
            env={**os.environ, "MLFLOW_DISABLE_TELEMETRY": "true", **environment},
            cwd=folder,
            stdout=log,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )
    try:
        _wait_for(f"http://127.0.0.1:{port}", process, Path(log.name))
        yield f"http://127.0.0.1:{port}"
    finally:
        for number in (signal.SIGTERM, signal.SIGKILL):
            with contextlib.suppress(ProcessLookupError, subprocess.TimeoutExpired):
                os.killpg(process.pid, number)
                process.wait(20)


def _wait_for(address: str, process: subprocess.Popen[bytes], log: Path) -> None:
    until = time.monotonic() + 240
    while True:
        with contextlib.suppress(urllib.error.URLError, ConnectionError, TimeoutError):
            urllib.request.urlopen(f"{address}/health", timeout=5).close()
            return
        assert process.poll() is None and time.monotonic() < until, log.read_text()
        time.sleep(0.2)


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


@pytest.mark.slow
def test_mlflow_serves_the_champion_from_a_server(place: Path, tmp_path: Path) -> None:
    """`mlflow server` has the registry and its files, and `mlflow models serve` gets the champion there; no process of
    either imports temper."""
    hook = "import sys\nclass Forbidden:\n    def find_spec(self, name, path=None, target=None):\n"
    hook += "        if name.split('.')[0] in ('temper', 'deepspeed', 'ray'):\n            raise ImportError(name)\n"
    (tmp_path / "sitecustomize.py").write_text(f"{hook}sys.meta_path.insert(0, Forbidden())\n")
    path = f"{Path(sys.executable).parent}:{os.environ['PATH']}"  # MLflow calls uvicorn by its name
    own = {"folder": str(tmp_path), "PYTHONPATH": str(tmp_path), "PATH": path}
    database = ["--backend-store-uri", f"sqlite:///{tmp_path}/server.db", "--artifacts-destination", str(tmp_path)]
    with serving(["server", *database, "--workers", "1"], free_port(), **own) as uri:
        build_client(uri).create_experiment("models")
        product = make_product(place, uri, *KINDS["resnet"], metrics={"test/accuracy": 0.5})
        registered = register(product, tmp_path / "out", "served")
        assert registered == Registered("models:/served/1", CHAMPION, "it is the first champion: test/accuracy 0.5")
        client = MlflowClient(uri)
        (output,) = client.get_run(product.run["run_id"]).outputs.model_outputs
        logged = client.get_logged_model(output.model_id)
        assert json.loads(logged.tags["mlflow.modelVersions"]) == [{"name": "served", "version": "1"}]
        assert len(client.get_metric_history(product.run["run_id"], "test/accuracy")) == 1
        (tmp_path / "teacher").mkdir()
        found = registry.download_version(uri, "served", "1", tmp_path / "teacher")
        assert found is not None and is_export(found)
        (tmp_path / "run").mkdir()
        found = registry.download_run_export(uri, product.run["run_id"], "dense", tmp_path / "run")
        assert found is not None and is_export(found)

        served = ["models", "serve", "--model-uri", "models:/served@champion", "--env-manager", "local"]
        with serving([*served, "--workers", "1"], free_port(), **own, MLFLOW_TRACKING_URI=uri) as service:
            inputs = batches_of(product)["3"]
            request = urllib.request.Request(
                f"{service}/invocations",
                json.dumps({"inputs": inputs.tolist()}).encode(),
                {"Content-Type": "application/json"},
            )
            with urllib.request.urlopen(request, timeout=60) as answer:
                predictions = json.load(answer)["predictions"]
    np.testing.assert_allclose(np.array(predictions), outputs_of(product, inputs), rtol=0, atol=1e-6)
