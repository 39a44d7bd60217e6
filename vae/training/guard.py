"""float16's loss scale: an update that overflows at it is made again, of the same images, at half of it.

torch's GradScaler leaves such an update out and lowers its scale. Counted as made, it would move the clock, the
schedule and every running mean without a step of the optimiser; not counted, the images would run ahead of the clock.


Nothing that is not finite reaches the weights: an update is looked at before it is made."""

from collections import deque
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor, nn

from vae.config.optim import GuardConfig
from vae.console import warn
from vae.data.decode import printable
from vae.data.loader import Batch
from vae.errors import NOT_FINITE, InputError, Stopped
from vae.training.run_dir import newest_whole

if TYPE_CHECKING:
    from vae.training.module import AutoencoderModule


SMALLEST = 1e-4  # as fairseq's; gradients that overflow float16 even there are no accident
RECENT, MANY = 100, 10  # updates; so many of them that overflow are no accident either


class LossScale:
    """The scale of a run's GradScaler; in other precisions there is none, and nothing overflows."""

    def __init__(self, training: "AutoencoderModule") -> None:
        self._training = training
        self._tried: list[float] = []  # for the update at hand
        self._recent: deque[bool] = deque(maxlen=RECENT)  # was the update made again?

    @property
    def used(self) -> float | None:
        """That of the gradients at hand."""
        return self._tried[-1] if self._tried else None

    @property
    def can_fall(self) -> bool:
        """Would gradients that are not finite be the scaler's to mend?"""
        return self.used is not None and self.used >= SMALLEST

    @property
    def has_fallen(self) -> bool:
        """Has the scaler left out the step that was just tried?"""
        now = self._now()
        return now is not None and self.used is not None and now < self.used

    @property
    def falls_often(self) -> bool:
        return sum(self._recent) >= MANY

    def note(self) -> None:
        """The gradients of an update are unscaled, and about to be looked at."""
        now = self._now()
        if now is not None:
            self._tried.append(now)

    def restore(self) -> None:
        """As before the update at hand: what is wrong with it is not the scale."""
        if self._tried:
            scaler = self._scaler
            scaler.load_state_dict(scaler.state_dict() | {"scale": self._tried[0]})

    def finish_update(self) -> None:
        """The update at hand is over."""
        self._recent.append(len(self._tried) > 1)
        self._tried.clear()

    def _now(self) -> float | None:
        return None if self._scaler is None else self._scaler.get_scale()

    @property
    def _scaler(self) -> Any:
        return getattr(self._training.trainer.precision_plugin, "scaler", None)


POLICIES = ("stop", "skip", "rollback")
NAMED = 3  # of each kind of culprit


class Culprits(NamedTuple):
    """What is not finite; `distance` from the cause: 0 weights, 1 terms, 2 gradients."""

    distance: int
    words: str


class Guard:
    """Between backward and step: all processes look, and all do the same.

    An update is made, left out, or to be made again at a lower loss scale; nothing but a made one moves an average.
    """

    def __init__(self, training: "AutoencoderModule", config: GuardConfig) -> None:
        self._training, self.config = training, config
        self.loss_scale = LossScale(training)
        self.skipped_updates = 0  # updates, since the run began
        self._seen: list[tuple[Batch, Mapping[str, Tensor]]] = []
        self._leaves_out = False

    def record(self, batch: Batch, terms: Mapping[str, Tensor]) -> None:
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
        if self._training.adversarial_loss is not None:
            self._training.adversarial_loss.discard()
        return batches

    def finish_update(self) -> bool:
        """The update is over; says whether it was made."""
        self._seen.clear()
        if self._leaves_out:
            self.loss_scale.restore()
        self.loss_scale.close()
        was_made, self._leaves_out = not self._leaves_out, False
        return was_made

    def check_finite(self, norms: Mapping[str, Tensor]) -> None:
        """Raise or leave the update out where a term or a gradient norm is not finite, on whichever process."""
        training = self._training
        values = [term for _, terms in self._seen for term in terms.values()]
        self.loss_scale.note()
        if not self.loss_scale.can_fall:
            values += norms.values()
        if training.process_group.all_reduce_max(int(not all_finite(values))):
            self._respond(training, nearest_causes(training.process_group.all_gather(self._culprits(training))))

    def _respond(self, training: "AutoencoderModule", culprits: str) -> None:
        self.loss_scale.restore()
        update = f"update {training.updates + 1} is not finite: {culprits}"
        policy, limit = self.config.on_non_finite, self.config.limit
        if policy == "stop" or self.skipped_updates >= limit:
            tried = (
                ""
                if policy == "stop"
                else f"; {self.skipped_updates} updates were left out before, guard.limit={limit}"
            )
            raise Stopped(NOT_FINITE, f"{update}; the weights are those before it{tried}")
        if policy == "rollback":
            update += f"; back to the weights of {_roll_back(training)}"
        self.skipped_updates += 1
        self._leaves_out = True
        for parameter in training.parameters():
            parameter.grad = None
        if training.adversarial_loss is not None:
            training.adversarial_loss.discard()
        if training.trainer.is_global_zero:
            warn(f"warning: {update}; left out ({self.skipped_updates} of at most {limit})")

    def _culprits(self, training: "AutoencoderModule") -> Culprits:
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

    def _images_of(self, training: "AutoencoderModule", terms: list[str]) -> list[str]:
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


def _roll_back(training: "AutoencoderModule") -> str:
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
