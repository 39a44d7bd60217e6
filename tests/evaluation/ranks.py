"""Evaluations by several processes, forked from this one: nothing is imported again."""

import faulthandler
import os
import socket
from collections.abc import Callable, Sequence
from multiprocessing import get_context
from multiprocessing.process import BaseProcess
from pathlib import Path

import numpy as np
import torch
from PIL import Image

from vae.config.data import DataConfig
from vae.config.model import AutoencoderConfig
from vae.config.schema import EvaluateConfig
from vae.evaluation.evaluate import evaluate
from vae.models.autoencoder_kl import AutoencoderKL
from vae.weights import save_autoencoder

CHEAP = ["psnr", "ssim", "l1", "colour_shift", "contrast", "saturation", "sharpness", "high_frequency"]
FILES = ("images.csv", "metrics.json", "report.html")


def pictures(folder: Path, count: int) -> Path:
    """Smooth and noisy images of different sizes, none below 40 pixels."""
    folder.mkdir(parents=True)
    for number in range(count):
        draw = np.random.default_rng(number)
        small = draw.integers(0, 256, (6, 6, 3), dtype=np.uint8)
        size = (int(draw.integers(40, 60)), int(draw.integers(40, 60)))
        image = np.asarray(Image.fromarray(small).resize(size, Image.Resampling.BICUBIC), dtype=np.int16)
        noisy = image + draw.integers(-20, 21, image.shape)
        Image.fromarray(noisy.clip(0, 255).astype(np.uint8)).save(folder / f"{number:03}.png")
    return folder


def saved_model(path: Path, config: AutoencoderConfig, seed: int = 0) -> str:
    torch.manual_seed(seed)
    return str(save_autoencoder(AutoencoderKL(config), path))


def config_of(folder: Path, images: Path, models: Sequence[str], batch: int = 2, **changes: object) -> EvaluateConfig:
    data = DataConfig(
        root=str(images),
        validation_fraction=1.0,
        validation_images=None,
        resolution=32,
        validation_batch_size=batch,
        workers=0,
    )
    given = {"model": list(models), "output": str(folder), "metrics": CHEAP, "probe_images": 1, "data": data}
    return EvaluateConfig(**(given | changes))  # pyright: ignore[reportArgumentType]


def in_processes(world: int, configs: Sequence[EvaluateConfig]) -> None:
    """`evaluate` of each, one after the other, by `world` processes that share its images."""
    ports = [_free_port() for _ in configs]

    def work(rank: int) -> None:
        faulthandler.dump_traceback_later(100, exit=True)  # a process that hangs says where, and frees the others
        torch.set_num_threads(1)
        os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(world)}
        os.environ["MASTER_ADDR"] = "127.0.0.1"
        for port, config in zip(ports, configs, strict=True):
            os.environ["MASTER_PORT"] = str(port)
            evaluate(config)

    processes = [forked(lambda rank=rank: work(rank)) for rank in range(world)]
    for process in processes:
        process.join(300)
    assert [process.exitcode for process in processes] == [0] * world


def forked(work: Callable[[], object]) -> BaseProcess:
    process = get_context("fork").Process(target=work)
    process.start()
    return process


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]
