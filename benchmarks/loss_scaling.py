"""What loss scaling (Micikevicius et al. 2018, section 3.2) gives a network that needs it, and one that does not.

    python benchmarks/loss_scaling.py [--data auto|speech|synthetic] [--steps 150] [--plot docs/loss_scaling.svg]

The network that needs it is a deep GRU that predicts the next frame of a magnitude spectrum. Its loss is averaged over
examples, long sequences and frequencies, and the numbers that it averages are small, so that the gradient of one output
is about 10⁻⁷: fp16 ends at 6·10⁻⁸. It is trained in fp32, in fp16 with the loss scales 1, 2⁴, 2⁸ and 2¹² and a dynamic
one, and in bf16, always by temper's engine on one CPU, with the same batches. Beside it: the share of gradients that
fp16 flushes to zero at the scales 2⁰ … 2¹⁶, for this network, for a deep GRU with CTC, and for a small convolutional
network on handwritten digits, which is trained, too, and does not need scaling.

The sounds are spoken digits (Free Spoken Digit Dataset) where `<data folder>/speech/fsdd/fsdd.npz` has them, and
otherwise synthetic ones: glides of a voice's pitch. The last line that is printed is JSON.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from curves import Curve, Panel, draw
from ranks import run_ranks
from temper.config.schema import JobConfig
from temper.data.batches import train_batches
from temper.data.download import data_root
from temper.data.sources import load_splits
from temper.engine.base import StepResult
from temper.engine.deepspeed_engine import DeepSpeedEngine
from temper.engine.deepspeed_setup import prepare
from temper.losses import build_loss
from temper.models.build import build_model
from temper.parallel.groups import MeshGroups, build_groups
from temper.plan.deepspeed_config import deepspeed_config
from temper.plan.facts import data_facts
from temper.plan.mesh import MeshPlan, plan_batch
from temper.precision.underflow import count_flushed
from temper.precision.watch import TwinWatch, WatchedStep

FRAMES, BINS, BATCH = 64, 128, 32
LAYERS, WIDTH = 3, 48
POWERS = range(17)
DYNAMIC = {"initial_scale": 65536.0, "scale_window": 40}
ARMS: dict[str, dict[str, Any]] = {
    "fp32": {"dtype": "fp32"},
    "fp16, scale 1": {"dtype": "fp16", "loss_scale": 1.0},
    "fp16, scale 2⁴": {"dtype": "fp16", "loss_scale": 16.0},
    "fp16, scale 2⁸": {"dtype": "fp16", "loss_scale": 256.0},
    "fp16, scale 2¹²": {"dtype": "fp16", "loss_scale": 4096.0},
    "fp16, dynamic": {"dtype": "fp16", **DYNAMIC},
    "bf16": {"dtype": "bf16"},
}


# ------------------------------------------------------------------------------------------------------------- sounds


@dataclass(frozen=True)
class Sounds:
    """Magnitude spectra of sounds, `(frames, 128)` each, in groups of one voice; mean and deviation of each frequency,
    and the variance that is left when the mean is predicted."""

    voices: list[list[Tensor]]
    mean: Tensor
    deviation: Tensor
    variance: float

    def batch(self, step: int) -> tuple[Tensor, Tensor]:
        """Sequences of sounds of one voice, normalised, and the frame that follows each frame, as it is."""
        generator = np.random.default_rng(step)
        frames = torch.zeros(BATCH, FRAMES + 1, BINS)
        for row in frames:
            voice = self.voices[generator.integers(len(self.voices))]
            picked = torch.cat([voice[index] for index in generator.integers(len(voice), size=8)])[: FRAMES + 1]
            row[: len(picked)] = picked
        return (frames[:, :-1] - self.mean) / self.deviation, frames[:, 1:]


def load_sounds(source: str) -> tuple[str, Sounds]:
    """`speech`, `synthetic`, or the first of them that there is; which one it is, and the sounds."""
    path = data_root() / "speech" / "fsdd" / "fsdd.npz"
    if source == "speech" or (source == "auto" and path.is_file()):
        return "speech", _sounds(_spoken_digits(path))
    return "synthetic", _sounds(_glides())


def _spoken_digits(path: Path) -> list[list[Tensor]]:
    """The recordings of the training split by speaker, 8 kHz, −1 … 1."""
    stored = np.load(path)
    audio, offsets = torch.from_numpy(stored["audio"].astype(np.float32) / 32768), stored["offsets"]
    voices: list[list[Tensor]] = [[] for _ in stored["speakers"]]
    for index in np.flatnonzero(stored["take"] >= 5):
        voices[stored["speaker"][index]].append(audio[offsets[index] : offsets[index + 1]])
    return voices


def _glides() -> list[list[Tensor]]:
    """Six voices, each with sixty sounds of 0.4 s: harmonics of a gliding pitch under a formant that swell and fade."""
    generator = torch.Generator().manual_seed(0)
    time = torch.arange(3200) / 8000

    def draw_between(low: float, high: float) -> float:
        return low + (high - low) * float(torch.rand((), generator=generator))

    def glide(pitch: float) -> Tensor:
        phase = torch.cumsum(pitch * (1 + draw_between(-0.5, 0.5) * time), 0) / 8000
        formant, harmonics = draw_between(300, 2500), torch.arange(1, 20)
        strengths = 1 / harmonics / (1 + ((harmonics * pitch - formant) / 300) ** 2)
        tone = (strengths[:, None] * torch.sin(2 * torch.pi * harmonics[:, None] * phase)).sum(0)
        return draw_between(0.2, 0.6) * torch.sin(torch.pi * time / 0.4) * tone

    return [[glide(pitch * draw_between(0.9, 1.1)) for _ in range(60)] for pitch in (90, 110, 130, 180, 210, 240)]


def _sounds(audio: list[list[Tensor]]) -> Sounds:
    voices = [[_magnitudes(sound) for sound in voice] for voice in audio]
    frames = torch.cat([sound for voice in voices for sound in voice])
    mean = frames.mean(0)
    return Sounds(voices, mean, frames.std(0) + 1e-8, float((frames - mean).square().mean()))


def _magnitudes(audio: Tensor) -> Tensor:
    """Short-time spectra, 32 ms long and 16 ms apart, of which the last frequency is left out."""
    spectra = torch.stft(audio, 256, 128, window=torch.hann_window(256), return_complex=True)
    return spectra.abs()[:BINS].t() / 128


# ----------------------------------------------------------------------------------------------------------- networks


class DeepGRU(nn.Module):
    """GRUs one above the other and a linear layer: `(examples, frames, inputs)` → `(examples, frames, outputs)`."""

    def __init__(self, inputs: int, layers: int, width: int, outputs: int) -> None:
        super().__init__()
        sizes = [inputs, *[width] * (layers - 1)]
        self.layers = nn.ModuleList(nn.GRU(size, width, batch_first=True) for size in sizes)
        self.head = nn.Linear(width, outputs)

    def forward(self, x: Tensor) -> Tensor:
        for layer in self.layers:
            x, _ = layer(x)
        return self.head(x)


def build_predictor(sounds: Sounds) -> nn.Module:
    """Begins by predicting nearly the mean, so that all that it learns shows in the loss."""
    torch.manual_seed(0)
    model = DeepGRU(BINS, LAYERS, WIDTH, BINS)
    with torch.no_grad():
        model.head.weight.mul_(0.01)
        model.head.bias.copy_(sounds.mean)
    return model


def mean_squares(outputs: Tensor, targets: Tensor) -> dict[str, Tensor]:
    return {"mse": F.mse_loss(outputs.float(), targets)}


def ctc_per_frame(outputs: Tensor, targets: Tensor) -> dict[str, Tensor]:
    """CTC (Graves et al. 2006) averaged over examples and frames; label 0 is the blank."""
    examples, frames = outputs.shape[:2]
    lengths = (torch.full((examples,), frames), torch.full((examples,), targets.shape[1]))
    log_shares = outputs.float().log_softmax(-1).transpose(0, 1)
    return {"ctc": F.ctc_loss(log_shares, targets, *lengths, reduction="sum") / (examples * frames)}


# -------------------------------------------------------------------------------------------------------------- arms


def build_engine(
    model: nn.Module, loss: Any, job: dict[str, Any], batch: int, groups: MeshGroups
) -> tuple[DeepSpeedEngine, JobConfig]:
    config = JobConfig.model_validate({"name": "loss_scaling", "budget": {"steps": 1}, **job})
    mesh, plan = MeshPlan(1, 1, "cpu"), plan_batch(batch, 1)
    trainable = sum(param.numel() for param in model.parameters())
    deepspeed = deepspeed_config(config, plan, mesh, trainable)
    return DeepSpeedEngine(model, loss, config, plan, mesh, groups, deepspeed), config


def sounds_job(precision: dict[str, Any]) -> dict[str, Any]:
    """Its model and data are handed to the engine; the job names what the engine reads of it."""
    return {
        "model": {"kind": "python", "target": "loss_scaling:build_predictor"},
        "data": {"kind": "synthetic", "shape": [FRAMES, BINS], "global_batch": BATCH},
        "optimizer": {"kind": "adam", "lr": 3.0e-3},
        "precision": precision,
    }


def train_predictor(
    sounds: Sounds, precision: dict[str, Any], steps: int, groups: MeshGroups, share_of: Callable[..., Any]
) -> dict[str, Any]:
    """Loss and loss scale of each step, skipped steps, and what `share_of` says before and after."""
    engine, config = build_engine(build_predictor(sounds), mean_squares, sounds_job(precision), BATCH, groups)
    before = share_of(engine, *sounds.batch(0))
    results: list[StepResult] = []
    for step in range(steps):
        inputs, targets = sounds.batch(step)
        results.append(engine.step(inputs, targets, lr=config.optimizer.lr, seed=step))
    explained = [1 - float(result.loss) / sounds.variance for result in results]
    return {
        "explained": explained,
        "end": float(np.mean(explained[-20:])),
        "scales": [result.loss_scale for result in results],
        "skipped": sum(not result.applied for result in results),
        "before": before,
        "after": share_of(engine, *sounds.batch(steps)),
    }


def shares(loss: Any) -> Callable[[DeepSpeedEngine, Tensor, Tensor], list[float]]:
    """A function that gives the shares that fp16 flushes at every scale, with an fp16 engine's weights."""

    def share_of(engine: DeepSpeedEngine, inputs: Tensor, targets: Tensor) -> list[float]:
        watch = TwinWatch(engine, loss, accumulation=1, group=None, underflow_every=1)
        looks = [watch(WatchedStep(1, inputs, targets, 0, True, 2.0**power)) for power in POWERS]
        return [look.metrics["precision/underflow"] for look in looks]

    return share_of


def nothing(*_unused: Any) -> list[float]:
    return []


def ctc_shares(sounds: Sounds) -> list[float]:
    """Of six GRUs with CTC on the same sounds, untrained."""
    torch.manual_seed(0)
    model = DeepGRU(BINS, 6, 64, 11)
    inputs, _ = sounds.batch(0)
    labels = torch.randint(1, 11, (BATCH, 4), generator=torch.Generator().manual_seed(0))

    def twin_in(dtype: torch.dtype) -> nn.Module:
        twin = DeepGRU(BINS, 6, 64, 11)
        twin.load_state_dict(model.half().state_dict())
        return twin.to(dtype)

    def share(power: int) -> float:
        def backward(twin: nn.Module, dtype: torch.dtype) -> None:
            (ctc_per_frame(twin(inputs.to(dtype)), labels)["ctc"] * 2.0**power).backward()

        return count_flushed(twin_in, backward).metrics()["precision/underflow"]

    return [share(power) for power in POWERS]


def train_digits(precision: dict[str, Any], steps: int, groups: MeshGroups, share_of: Any) -> dict[str, Any]:
    """The small convolutional network of `jobs/digits.yaml`."""
    job = {
        "model": {"kind": "cnn", "channels": [16, 32], "hidden": 64},
        "data": {"kind": "digits", "global_batch": 64},
        "optimizer": {"kind": "adamw", "lr": 2.0e-3},
        "precision": precision,
    }
    config = JobConfig.model_validate({"name": "digits", "budget": {"steps": steps}, **job})
    facts = data_facts(config.data, Path.cwd())
    splits = load_splits(config.data, Path.cwd(), facts)
    loss = build_loss(config.loss)
    engine, config = build_engine(build_model(config.model, facts, 0), loss, job, 64, groups)

    def batches(first: int, last: int) -> Iterator[tuple[Tensor, Tensor]]:
        part: dict[str, Any] = {"seed": 0, "batch": plan_batch(64, 1), "rank": 0, "world_size": 1}
        for batch, _ in train_batches(config.data, splits["train"], facts, first_step=first, last_step=last, **part):
            yield batch.inputs, batch.targets

    losses = [
        float(engine.step(inputs, targets, lr=config.optimizer.lr, seed=step).loss)
        for step, (inputs, targets) in enumerate(batches(0, steps))
    ]
    inputs, targets = next(batches(steps, steps + 1))
    right = [float((engine.predict(x).argmax(1) == y).float().mean()) for x, y in batches(steps, steps + 20)]
    return {"losses": losses, "accuracy": float(np.mean(right)), "shares": share_of(engine, inputs, targets)}


def compute(rank: int, source: str, steps: int) -> dict[str, Any]:
    """Everything, in one process."""
    prepare("cpu")
    groups = build_groups(1)
    kind, sounds = load_sounds(source)
    arms = {
        name: train_predictor(
            sounds, precision, steps, groups, shares(mean_squares) if name == "fp16, dynamic" else nothing
        )
        for name, precision in ARMS.items()
    }
    cross_entropy = build_loss(JobConfig.model_fields["loss"].get_default(call_default_factory=True))
    digits = {
        name: train_digits(ARMS[name], 120, groups, shares(cross_entropy) if name == "fp16, scale 1" else nothing)
        for name in ("fp32", "fp16, scale 1", "bf16")
    }
    dynamic = arms["fp16, dynamic"]
    return {
        "data": kind,
        "arms": arms,
        "digits": digits,
        "shares": {
            "GRU, untrained": dynamic["before"],
            "GRU, trained": dynamic["after"],
            "GRU with CTC, untrained": ctc_shares(sounds),
            "CNN on digits, trained": digits["fp16, scale 1"]["shares"],
        },
    }


# ---------------------------------------------------------------------------------------------------------- reporting


def print_tables(found: dict[str, Any]) -> None:
    print(f"Next frame of {found['data']}: variance explained at the end; steps skipped; last loss scale")
    for name, arm in found["arms"].items():
        scale = "" if arm["scales"][-1] is None else f"{arm['scales'][-1]:g}"
        print(f"{name:>16}  {arm['end']:6.3f}  {arm['skipped']:3}  {scale}")
    print("\nShare of gradient values that fp16 flushes to zero, by loss scale")
    print(" " * 24 + "".join(f"{f'2^{power}':>6}" for power in POWERS[::2]))
    for name, values in found["shares"].items():
        print(f"{name:>24}" + "".join(f"{value:6.3f}" for value in values[::2]))
    print("\nThe small network on digits does not need scaling: last loss, accuracy")
    for name, arm in found["digits"].items():
        print(f"{name:>16}  {np.mean(arm['losses'][-20:]):6.3f}  {arm['accuracy']:6.3f}")


def plot(found: dict[str, Any], path: Path) -> None:
    flushed = Panel(
        "Gradients that fp16 flushes to zero",
        "loss scale, power of two",
        "share",
        [Curve(name, list(enumerate(values))) for name, values in found["shares"].items()],
    )
    learnt = Panel(
        "Deep GRU, loss averaged over long sequences",
        "step",
        "variance explained",
        [Curve(name, _smoothed(arm["explained"])) for name, arm in found["arms"].items()],
    )
    path.write_text(draw([flushed, learnt]))


def _smoothed(values: list[float], window: int = 10) -> list[tuple[float, float]]:
    """Means over ten steps each; what is worse than the mean prediction is cut off."""
    starts = range(0, len(values) - window + 1, window)
    return [(start + window / 2, max(float(np.mean(values[start : start + window])), -0.1)) for start in starts]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--data", choices=("auto", "speech", "synthetic"), default="auto")
    parser.add_argument("--steps", type=int, default=150)
    parser.add_argument("--plot", type=Path, help="write an SVG picture")
    options = parser.parse_args()
    [found] = run_ranks(compute, 1, options.data, options.steps)
    print_tables(found)
    if options.plot is not None:
        plot(found, options.plot)
    summary = {
        "data": found["data"],
        "explained": {name: arm["end"] for name, arm in found["arms"].items()},
        "skipped": {name: arm["skipped"] for name, arm in found["arms"].items()},
        "shares": found["shares"],
        "digits": {name: arm["accuracy"] for name, arm in found["digits"].items()},
    }
    print(json.dumps(summary))


if __name__ == "__main__":
    main()
