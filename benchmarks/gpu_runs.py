"""Checks of whole runs on a GPU: training, going on, cached latents, evaluation."""

import csv
import math
import statistics
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from unittest.mock import patch

import torch
from safetensors.torch import load_file
from torch import Tensor

from vae.cli import main as vae_command
from vae.config.compose import compose
from vae.config.data import DataConfig
from vae.config.schema import EvaluateConfig
from vae.evaluation.evaluate import evaluate
from vae.training.train import train

Found = tuple[bool, str]
UPDATES, HALFWAY, SIDE = 20, 10, 64
ENDS = 5  # of the updates, first against last
DRIFT = 10.0  # times what two equal runs are apart
SAME_WEIGHTS, SAME_LATENTS = 1e-6, 1e-3
SAME_METRICS = {"psnr": 0.01, "ssim": 1e-4, "lpips_alex": 1e-4}


class Runs:
    """A folder that all checks share; what one leaves the next goes on with."""

    def __init__(self, photos: Path, device: torch.device) -> None:
        self._kept = tempfile.TemporaryDirectory()
        self.folder, self.photos, self.device = Path(self._kept.name), photos, device

    def train(self, name: str, precision: str, updates: int = UPDATES, resume: bool = False) -> Path:
        accelerator = "gpu" if self.device.type == "cuda" else "cpu"
        return train(
            compose(
                "experiment=quickstart",
                f"name={name}",
                f"output={self.folder}",
                f"updates={updates}",
                f"validate_every={HALFWAY}",
                "data=folder",
                f"data.root={self.photos}",
                f"data.resolution={SIDE}",
                "data.validation_images=8",
                "data.workers=0",
                "loss.discriminator_start=0",
                "loss.adversarial_start=0",
                "loss.adversarial_ramp=0",
                "optim.schedule=constant",
                "optim.warmup_updates=0",
                f"trainer.accelerator={accelerator}",
                f"trainer.precision={precision}",
                "trainer.log_every_n_steps=1",
                "trainer.enable_progress_bar=false",
                f"resume={self.folder / name if resume else 'null'}",
            )
        )

    def losses_fall(self, precision: str) -> Found:
        run = self.train(precision, precision)
        with (run / "metrics.csv").open(encoding="utf-8") as file:
            rows = list(csv.DictReader(file))
        values = [float(cell) for row in rows for cell in row.values() if cell]
        pixel = [float(row["train/pixel"]) for row in rows if row.get("train/pixel")]
        played = any(row.get("train/adaptive_weight") for row in rows)
        first, last = statistics.mean(pixel[:ENDS]), statistics.mean(pixel[-ENDS:])
        finite = all(map(math.isfinite, values))
        figure = f"{len(pixel)} updates, pixel {first:.3f} to {last:.3f}, finite {finite}, GAN {played}"
        return finite and played and last < first and len(pixel) == UPDATES, figure

    def goes_on(self) -> Found:
        """Against the same run uninterrupted; two equal runs say how far equal ones are apart here."""
        whole, again = self.train("whole", "32-true"), self.train("again", "32-true")
        self.train("halves", "32-true", updates=HALFWAY)
        halves = self.train("halves", "32-true", resume=True)
        apart = {run.name: _largest_difference(_weights(whole), _weights(run)) for run in (again, halves)}
        limit = max(SAME_WEIGHTS, DRIFT * apart["again"])
        return apart["halves"] <= limit, f"resumed {apart['halves']:.1e} apart, the same run twice {apart['again']:.1e}"

    def same_latents(self) -> Found:
        """As `vae cache-latents` writes them; TF32 is off in these checks."""
        model, images = next(self.folder.glob("32-true/exports/*/diffusers")), self._few()
        means = []
        for device in ("cpu", self.device.type):
            target = self.folder / f"latents_{device}_{len(means)}"
            options = ["--device", device, "--dtype", "float32", "--resolution", str(SIDE), "--workers", "0"]
            with patch.object(sys, "argv", ["vae", "cache-latents", str(model), str(images), str(target), *options]):
                try:
                    vae_command()
                except SystemExit as end:
                    if end.code:
                        raise
            means.append(torch.cat([load_file(file)["mean"] for file in sorted(target.glob("*.safetensors"))]))
        error = (means[0] - means[1]).abs().max().item()
        figure = f"{len(means[0])} images, max-abs {error:.1e}, of latents up to {means[0].abs().max().item():.1f}"
        return error < SAME_LATENTS, figure

    def same_metrics(self) -> Found:
        model, images, found = next(self.folder.glob("32-true/exports/*/diffusers")), self._few(), []
        for device in ("cpu", self.device.type):
            data = DataConfig(root=str(images), resolution=SIDE, validation_fraction=1.0, workers=0)
            name, output = f"{device}_{len(found)}", str(self.folder / "evaluations")
            config = EvaluateConfig(
                model=str(model), name=name, output=output, device=device, metrics=list(SAME_METRICS), data=data
            )
            with (evaluate(config) / "images.csv").open(encoding="utf-8") as file:
                rows = list(csv.DictReader(file))
            found.append({metric: statistics.mean(float(row[metric]) for row in rows) for metric in SAME_METRICS})
        apart = {metric: abs(found[0][metric] - found[1][metric]) for metric in SAME_METRICS}
        said = ", ".join(f"{metric} {found[1][metric]:.4f} ({error:.0e} apart)" for metric, error in apart.items())
        return all(error < SAME_METRICS[metric] for metric, error in apart.items()), said

    def _few(self) -> Path:
        """A folder of 32 of the photographs."""
        few = self.folder / "few"
        if not few.is_dir():
            few.mkdir()
            for file in sorted(self.photos.iterdir())[:32]:
                (few / file.name).write_bytes(file.read_bytes())
        return few


def run_checks(photos: Path, device: torch.device) -> dict[str, Callable[[], Found]]:
    runs = Runs(photos, device)
    precisions = ["32-true", "bf16-mixed", *(["16-mixed"] if device.type == "cuda" else [])]
    trained: dict[str, Callable[[], Found]] = {
        f"vae.train, {UPDATES} updates with GAN, {precision}": lambda precision=precision: runs.losses_fall(precision)
        for precision in precisions
    }
    return trained | {
        "a resumed run has the weights of one that was not": runs.goes_on,
        "vae cache-latents against the CPU's": runs.same_latents,
        "evaluation against the CPU's": runs.same_metrics,
    }


def _weights(run: Path) -> dict[str, Tensor]:
    newest = max((run / "checkpoints").glob("*.ckpt"))
    return torch.load(newest, map_location="cpu", weights_only=True)["state_dict"]


def _largest_difference(one: dict[str, Tensor], other: dict[str, Tensor]) -> float:
    assert one.keys() == other.keys()
    return max((one[key].double() - other[key].double()).abs().max().item() for key in one)
