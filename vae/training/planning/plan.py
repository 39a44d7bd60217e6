"""`plan`: what a run will take, before it is started. No image is looked at and nothing is written."""

import shutil
from dataclasses import dataclass

from torch import nn

from vae.config import TrainConfig
from vae.data.opening import open_sources
from vae.training.best import Best
from vae.training.folder import folder_of
from vae.training.planning.costs import DryRun
from vae.training.planning.needs import Memory, Sizing
from vae.training.planning.pace import Pace, measure_pace
from vae.training.planning.target import available_to, checked, name_of, notes_about, target_of
from vae.training.saving import KEPT, checkpoint_bytes

ASLEEP = -1  # updates done, before any discriminator starts
RECONSTRUCTION = "reconstruction"


@dataclass(frozen=True)
class Network:
    """Parameters, how many of them learn, and floating-point operations for each training image, with all terms active
    and in both directions. None where they are counted with the whole.
    """

    parameters: int
    learning: int
    flops: float | None


@dataclass(frozen=True)
class Phase:
    """Updates that consist of the same: floating-point operations of one, on all processes, and its seconds."""

    name: str
    updates: int
    flops: int
    seconds: float | None


@dataclass(frozen=True)
class Disk:
    """Bytes of a checkpoint, of all checkpoints and the best export while they are written, and that are free."""

    checkpoint: int
    needed: int
    available: int


@dataclass(frozen=True)
class Plan:
    """`pace` is what the seconds are predicted from, and with them it is None where the device is elsewhere.

    Epochs are None where images are not counted. `reduced` are bytes of gradients that each process exchanges an
    update. `notes` say what is not in the numbers.
    """

    networks: dict[str, Network]
    phases: list[Phase]
    pace: Pace | None
    memory: Memory
    disk: Disk
    device: str
    processes: int
    images_per_update: int
    images_seen: int
    epochs: float | None
    reduced: int
    notes: list[str]

    @property
    def hours(self) -> float | None:
        """Of all updates, without validations."""
        seconds = [None if one.seconds is None else one.updates * one.seconds for one in self.phases]
        return None if None in seconds else sum(filter(None, seconds)) / 3600


def plan(config: TrainConfig) -> Plan:
    """Follow an update of `config` on tensors without contents; where its device is here, make some small real ones.

    Refuses with InputError what a run would refuse, but for its images and for devices that are elsewhere.
    """
    target = target_of(config)
    config = checked(config, target)
    *earlier, (name, start, updates) = _spans(config)
    dry, batch = DryRun(config, target), config.data.batch_size
    sizing, available = Sizing(dry, start), available_to(target)
    pace = None
    if available is not None:
        pace = measure_pace(config, target, start, lambda images, size: sizing.for_size(images, size) <= available)
    asleep = dry.cost(1, ASLEEP).flops
    flops = [
        (one, count, batch * (asleep if one == RECONSTRUCTION else dry.cost(1, first).flops))
        for one, first, count in earlier
    ]
    flops.append((name, updates, sizing.cost.flops))
    together = batch * target.processes * target.accumulate
    images = len(open_sources(config.data)[0]) if config.data.source == "photos" else None
    return Plan(
        networks=_networks(dry, asleep / target.accumulate, sizing.cost.flops / (batch * target.accumulate)),
        phases=[
            Phase(one, count, target.processes * each, None if pace is None else pace.seconds(each, target.accumulate))
            for one, count, each in flops
        ],
        pace=pace,
        memory=sizing.memory(available),
        disk=_disk(config, dry),
        device=name_of(target),
        processes=target.processes,
        images_per_update=together,
        images_seen=config.updates * together,
        epochs=None if images is None else config.updates * together / images,
        reduced=dry.gradients if target.processes > 1 else 0,
        notes=list(notes_about(config, target)),
    )


def _spans(config: TrainConfig) -> list[tuple[str, int, int]]:
    """(name, first update, number of updates) of each part of the run."""
    loss, begun = config.loss, {0: RECONSTRUCTION}
    if loss.weights.adversarial:
        begun |= {loss.discriminator_start: "the discriminator learns"}
        begun |= {0: "the discriminator alone", loss.autoencoder_start: "both learn"} if loss.autoencoder_start else {}
        begun |= {loss.adversarial_start: "adversarial"}
    ends = [*list(begun)[1:], config.updates]
    spans = [
        (name, start, min(end, config.updates) - start) for (start, name), end in zip(begun.items(), ends, strict=True)
    ]
    return [span for span in spans if span[2] > 0]


def _networks(dry: DryRun, asleep: float, active: float) -> dict[str, Network]:
    """The operations for an image while the discriminator is `asleep`, and with all that is `active` at the end."""
    training = dry.training
    autoencoder, teacher = training.autoencoder, training.autoencoding.teacher
    lpips = training.objective.lpips if training.autoencoding.decodes else None
    perceptual = 0 if lpips is None else dry.perceptual_flops(1)
    found = {
        "autoencoder": _network([autoencoder], asleep - perceptual),
        "encoder": _network([autoencoder.encoder, autoencoder.quant_conv]),
        "decoder": _network([autoencoder.post_quant_conv, autoencoder.decoder]),
    }
    if teacher is not None:
        found["teacher"] = _network([teacher.model])
    if training.discriminator is not None:
        found["discriminator"] = _network([training.discriminator], active - asleep)
    return found if lpips is None else found | {"LPIPS": _network([lpips], perceptual)}


def _network(parts: list[nn.Module], flops: float | None = None) -> Network:
    parameters = [parameter for part in parts for parameter in part.parameters()]
    learning = sum(parameter.numel() for parameter in parameters if parameter.requires_grad)
    return Network(sum(parameter.numel() for parameter in parameters), learning, flops)


def _disk(config: TrainConfig, dry: DryRun) -> Disk:
    """As a run checks it when it begins."""
    folder, checkpoint = folder_of(config), checkpoint_bytes(dry.training)
    best = Best(folder, config.best_metric).bytes_still_needed(dry.training)
    there = next(path for path in (folder.absolute(), *folder.absolute().parents) if path.is_dir())
    return Disk(checkpoint, (KEPT + 1) * checkpoint + best, shutil.disk_usage(there).free)
