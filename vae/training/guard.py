"""Nothing that is not finite reaches the weights: an update is looked at before it is made."""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

import torch
from torch import Tensor, nn

from vae.data.limits import printable
from vae.data.loading import Batch
from vae.errors import NOT_FINITE, InputError, Stopped, require
from vae.training.console import warn
from vae.training.loss_scale import LossScale
from vae.training.manifest import newest_whole

if TYPE_CHECKING:
    from vae.training.module import Training

POLICIES = ("stop", "skip", "rollback")
NAMED = 3  # of each kind of culprit


@dataclass
class GuardConfig:
    """What becomes of an update of which a loss or a gradient is not finite.

    `on_non_finite`: "stop" the run; "skip" the update; "rollback" to the weights and the optimiser of the last
    checkpoint, and go on with the next images. The latter two at most `limit` times in a run, then it stops.
    """

    on_non_finite: str = "stop"
    limit: int = 3

    def __post_init__(self) -> None:
        known = self.on_non_finite in POLICIES
        require(known, f"guard.on_non_finite={self.on_non_finite!r}", f"one of {list(POLICIES)}")
        require(self.limit >= 1, f"guard.limit={self.limit}", "1 or more")


class Culprits(NamedTuple):
    """What is not finite; `distance` from the cause: 0 weights, 1 terms, 2 gradients."""

    distance: int
    words: str


class Guard:
    """Between backward and step: all processes look, and all do the same.

    An update is made, left out, or to be made again at a lower loss scale; nothing but a made one moves an average.
    """

    def __init__(self, training: "Training", config: GuardConfig) -> None:
        self._training, self.config = training, config
        self.loss_scale = LossScale(training)
        self.left_out = 0  # updates, since the run began
        self._seen: list[tuple[Batch, Mapping[str, Tensor]]] = []
        self._leaves_out = False

    def remember(self, batch: Batch, terms: Mapping[str, Tensor]) -> None:
        """One micro-batch of the update at hand, and its raw terms."""
        self._seen.append((batch, dict(terms)))

    @property
    def asks_again(self) -> bool:
        """Did the update that was just tried overflow float16, by its loss scale and nothing else?"""
        return not self._leaves_out and self.loss_scale.has_fallen

    def begin_again(self) -> list[Batch]:
        """Nothing of the update has happened; gives its micro-batches."""
        batches = [batch for batch, _ in self._seen]
        self._seen.clear()
        if self._training.game is not None:
            self._training.game.forget()
        return batches

    def close(self) -> bool:
        """The update is over; says whether it was made."""
        self._seen.clear()
        if self._leaves_out:
            self.loss_scale.restore()
        self.loss_scale.close()
        was_made, self._leaves_out = not self._leaves_out, False
        return was_made

    def look(self, norms: Mapping[str, Tensor]) -> None:
        """Raise or leave the update out where a term or a gradient norm is not finite, on whichever process."""
        training = self._training
        values = [term for _, terms in self._seen for term in terms.values()]
        self.loss_scale.note()
        if not self.loss_scale.can_fall:
            values += norms.values()
        if training.council.highest(int(not all_finite(values))):
            self._respond(training, nearest_causes(training.council.all_of(self._culprits(training))))

    def _respond(self, training: "Training", culprits: str) -> None:
        self.loss_scale.restore()
        update = f"update {training.updates + 1} is not finite: {culprits}"
        policy, limit = self.config.on_non_finite, self.config.limit
        if policy == "stop" or self.left_out >= limit:
            tried = "" if policy == "stop" else f"; {self.left_out} updates were left out before, guard.limit={limit}"
            raise Stopped(NOT_FINITE, f"{update}; the weights are those before it{tried}")
        if policy == "rollback":
            update += f"; back to the weights of {_roll_back(training)}"
        self.left_out += 1
        self._leaves_out = True
        for parameter in training.parameters():
            parameter.grad = None
        if training.game is not None:
            training.game.forget()
        if training.trainer.is_global_zero:
            warn(f"warning: {update}; left out ({self.left_out} of at most {limit})")

    def _culprits(self, training: "Training") -> Culprits:
        """Weights, else terms and the images they are of, else gradients, as this process has them."""
        found = {name: not_finite_in(network) for name, network in training.networks.items()}
        weights = [f"{network}.{name}" for network, (names, _) in found.items() for name in names]
        if weights:
            return Culprits(0, f"weights {_some(weights)}")
        seen = [term for _, terms in self._seen for term in terms.items()]
        terms = list(dict.fromkeys(name for name, value in seen if not torch.isfinite(value).all()))  # as computed
        if terms:
            return Culprits(1, f"{_some(terms)} of {_some(self._images_of(training, terms))}")
        gradients = [f"{network}.{name}" for network, (_, names) in found.items() for name in names]
        images = [name for batch, _ in self._seen for name in batch.names]
        return Culprits(2, f"gradients of {_some(gradients)}, images {_some(images)}")

    def _images_of(self, training: "Training", terms: list[str]) -> list[str]:
        """Those images that are not finite by themselves; all of the micro-batch where none is."""
        names = []
        for batch, seen in self._seen:
            if all(name not in seen or torch.isfinite(seen[name]).all() for name in terms):
                continue
            single = [batch.single(place) for place in range(len(batch.names))]
            with training.trainer.precision_plugin.forward_context():
                alone = [one for one in single if not all_finite(training.terms_of(one).values())]
            names += [one.names[0] for one in alone or single]
        return names


def nearest_causes(found: list[Culprits]) -> str:
    """Of all processes: one process's term has made every process's gradient not finite."""
    nearest = min(culprits.distance for culprits in found)
    return "; ".join(sorted({culprits.words for culprits in found if culprits.distance == nearest}))


def all_finite(values: Iterable[Tensor]) -> bool:
    """Of tensors on one device, which is waited for once."""
    finite = [torch.isfinite(value).all() for value in values]
    return not finite or bool(torch.stack(finite).all())


def not_finite_in(network: nn.Module) -> tuple[list[str], list[str]]:
    """Names of parameters that are not finite, and of those whose gradient is not."""
    named = list(network.named_parameters())
    weights = [name for name, parameter in named if not torch.isfinite(parameter).all()]
    gradients = [name for name, p in named if p.grad is not None and not torch.isfinite(p.grad).all()]
    return weights, gradients


def _roll_back(training: "Training") -> str:
    """Weights, averages and optimiser as the last checkpoint has them; clock, schedule and data go on."""
    folder = Path(training.trainer.default_root_dir) / "checkpoints"
    try:
        path, _ = newest_whole(folder)
    except InputError as error:
        raise Stopped(
            NOT_FINITE, f"update {training.updates + 1} is not finite, and nothing to go back to ({error})"
        ) from error
    checkpoint = torch.load(path, map_location="cpu", weights_only=True, mmap=True)
    training.load_state_dict(checkpoint["state_dict"])
    training.trainer.optimizers[0].load_state_dict(checkpoint["optimizer_states"][0])
    return path.name


def _some(names: list[str]) -> str:
    rest = len(names) - NAMED
    return ", ".join(map(printable, names[:NAMED])) + (f" and {rest} more" if rest > 0 else "")
