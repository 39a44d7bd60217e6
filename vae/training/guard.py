"""The guard against values that are not finite: it checks an update before the optimiser makes it.

An update that overflows float16 is made again, from the same images, at half the loss scale. torch's GradScaler only
skips such an update and lowers its scale. If the skipped update counted, the clock, the schedule and every running
mean would move without a step of the optimiser. If it did not count, the images would run ahead of the clock.
"""

from collections import deque
from collections.abc import Iterable, Iterator, Mapping
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor, nn

from vae.config.optim import GuardConfig
from vae.console import warn
from vae.data.loader import Batch
from vae.distributed import ProcessGroup
from vae.errors import NOT_FINITE, InputError, Stopped, printable
from vae.losses.adversarial import AdversarialLoss
from vae.run_dir import RunDir
from vae.training.manifest import newest_whole

SMALLEST = 1e-4  # least loss scale, as in fairseq; gradients that overflow float16 even there are no accident
RECENT, MANY = 100, 10  # updates; that many overflows among the recent ones are no accident either


class Guarded(Protocol):
    """What a guard needs of the Lightning module: its networks, its terms, and the other processes."""

    trainer: Any
    process_group: ProcessGroup
    adversarial_loss: AdversarialLoss | None

    @property
    def updates(self) -> int:
        """The clock."""
        ...

    @property
    def networks(self) -> dict[str, nn.Module]:
        """The networks that learn, by name."""
        ...

    def terms_of(self, batch: Batch) -> Mapping[str, Tensor]:
        """Compute the terms of one batch."""
        ...

    def parameters(self) -> Iterator[nn.Parameter]:
        """Yield every parameter."""
        ...

    def load_state_dict(self, state_dict: Mapping[str, Any]) -> object:
        """Load weights, EMA weights and running means."""
        ...


class LossScale:
    """The loss scale of a run's GradScaler. Other precisions have none, and nothing overflows there."""

    def __init__(self, training: Guarded) -> None:
        self._training = training
        self._tried: list[float] = []  # scales tried for the current update
        self._recent: deque[bool] = deque(maxlen=RECENT)  # was the update made again?

    @property
    def used(self) -> float | None:
        """The scale of the gradients of the current update, or None without a scaler."""
        return self._tried[-1] if self._tried else None

    @property
    def can_fall(self) -> bool:
        """Whether a lower scale could mend gradients that are not finite."""
        return self.used is not None and self.used >= SMALLEST

    @property
    def has_fallen(self) -> bool:
        """Whether the scaler has skipped the step that was just tried."""
        now = self._now()
        return now is not None and self.used is not None and now < self.used

    @property
    def falls_often(self) -> bool:
        """Whether at least MANY of the last RECENT updates had to be made again."""
        return sum(self._recent) >= MANY

    def note(self) -> None:
        """Note the scale of an update whose gradients are unscaled and about to be checked."""
        now = self._now()
        if now is not None:
            self._tried.append(now)

    def restore(self) -> None:
        """Set the scale to what it was before the current update: what is wrong with it is not the scale."""
        if self._tried:
            scaler = self._scaler
            scaler.load_state_dict(scaler.state_dict() | {"scale": self._tried[0]})

    def finish_update(self) -> None:
        """Note whether the current update was made again, and forget its scales."""
        self._recent.append(len(self._tried) > 1)

        self._tried.clear()

    def _now(self) -> float | None:
        """Return the scaler's scale as it is now, or None without a scaler."""
        return None if self._scaler is None else self._scaler.get_scale()

    @property
    def _scaler(self) -> Any:
        """The GradScaler of the run, or None."""
        return getattr(self._training.trainer.precision_plugin, "scaler", None)


NAMED = 3  # culprits of each kind that a message names


class Culprits(NamedTuple):
    """What is not finite, in `words`; `distance` from the cause: 0 weights, 1 terms, 2 gradients."""

    distance: int
    words: str


class Guard:
    """Decide between backward and step whether an update is made; all processes check, and all do the same.

    An update is made, skipped, or made again at a lower loss scale. Only an update that is made moves an average.
    """

    def __init__(self, training: Guarded, config: GuardConfig) -> None:
        self._training = training
        self.config = config
        self.loss_scale = LossScale(training)
        self.skipped_updates = 0  # since the run began
        self._seen: list[tuple[Batch, Mapping[str, Tensor]]] = []
        self._leaves_out = False

    def record(self, batch: Batch, terms: Mapping[str, Tensor]) -> None:
        """Remember one micro-batch of the current update, and its raw terms."""
        self._seen.append((batch, dict(terms)))

    @property
    def asks_again(self) -> bool:
        """Whether the update that was just tried overflowed float16 only because of its loss scale."""
        return not self._leaves_out and self.loss_scale.has_fallen

    def begin_again(self) -> list[Batch]:
        """Forget the current update and return its micro-batches: nothing of it has happened."""
        batches = [batch for batch, _ in self._seen]
        self._seen.clear()
        if self._training.adversarial_loss is not None:
            self._training.adversarial_loss.discard()
        return batches

    def finish_update(self) -> bool:
        """End the current update and return whether it was made."""
        self._seen.clear()
        if self._leaves_out:
            self.loss_scale.restore()

        self.loss_scale.finish_update()
        was_made, self._leaves_out = not self._leaves_out, False
        return was_made

    def check_finite(self, norms: Mapping[str, Tensor]) -> None:
        """Check terms and gradient norms of the current update, on all processes.

        `norms` are the gradient norms by network, before clipping. If a value is not finite on any process, the
        update is skipped, or `Stopped` is raised, as the configuration says. Gradients that a lower loss scale may
        mend are not checked: the scaler skips their step itself.
        """
        training = self._training
        values = [term for _, terms in self._seen for term in terms.values()]
        self.loss_scale.note()
        if not self.loss_scale.can_fall:
            values += norms.values()

        if training.process_group.all_reduce_max(int(not all_finite(values))):
            self._respond(training, nearest_causes(training.process_group.all_gather(self._culprits(training))))

    def _respond(self, training: Guarded, culprits: str) -> None:
        """Skip the update on all processes, after going back to the last checkpoint if the policy is to roll back.

        Raises `Stopped` if the policy is to stop, or if `limit` updates were skipped before.
        """
        self.loss_scale.restore()

        update = f"update {training.updates + 1} is not finite: {culprits}"
        policy, limit = self.config.on_non_finite, self.config.limit
        if policy == "stop" or self.skipped_updates >= limit:
            tried = (
                "" if policy == "stop" else f"; {self.skipped_updates} updates were skipped before, guard.limit={limit}"
            )
            raise Stopped(NOT_FINITE, f"{update}; the weights are those before it{tried}")

        if policy == "rollback":
            update += f"; back to the weights of {_roll_back(training)}"

        # The optimiser still steps, but without gradients its step changes nothing.
        self.skipped_updates += 1
        self._leaves_out = True
        for parameter in training.parameters():
            parameter.grad = None
        if training.adversarial_loss is not None:
            training.adversarial_loss.discard()

        if training.trainer.is_global_zero:
            warn(f"{update}; skipped ({self.skipped_updates} of at most {limit})")

    def _culprits(self, training: Guarded) -> Culprits:
        """Return what is not finite on this process: weights, else terms and their images, else gradients."""
        found = {name: not_finite_in(network) for name, network in training.networks.items()}
        weights = [f"{network}.{name}" for network, (names, _) in found.items() for name in names]
        if weights:
            return Culprits(0, f"weights {_some(weights)}")

        # Terms are named in the order in which they were computed.
        seen = [term for _, terms in self._seen for term in terms.items()]
        terms = list(dict.fromkeys(name for name, value in seen if not torch.isfinite(value).all()))
        if terms:
            return Culprits(1, f"{_some(terms)} of {_some(self._images_of(training, terms))}")

        gradients = [f"{network}.{name}" for network, (_, names) in found.items() for name in names]
        images = [name for batch, _ in self._seen for name in batch.names]
        return Culprits(2, f"gradients of {_some(gradients)}, images {_some(images)}")

    def _images_of(self, training: Guarded, terms: list[str]) -> list[str]:
        """Return the images that are not finite by themselves, or all of the micro-batch if none is."""
        names = []
        for batch, seen in self._seen:
            if all(name not in seen or torch.isfinite(seen[name]).all() for name in terms):
                continue

            # A term is a mean over the batch, so only single images show which of them is to blame.
            single = [batch.single(place) for place in range(len(batch.names))]
            with training.trainer.precision_plugin.forward_context():
                alone = [one for one in single if not all_finite(training.terms_of(one).values())]
            names += [one.names[0] for one in alone or single]
        return names


def nearest_causes(found: list[Culprits]) -> str:
    """Describe the culprits of all processes that are nearest to the cause.

    A term that is not finite on one process makes the gradients of all processes not finite.
    """
    nearest = min(culprits.distance for culprits in found)
    return "; ".join(sorted({culprits.words for culprits in found if culprits.distance == nearest}))


def all_finite(values: Iterable[Tensor]) -> bool:
    """Return whether all tensors are finite. They must be on one device, which is waited for only once."""
    finite = [torch.isfinite(value).all() for value in values]
    return not finite or bool(torch.stack(finite).all())


def not_finite_in(network: nn.Module) -> tuple[list[str], list[str]]:
    """Return the names of parameters that are not finite, and of those whose gradient is not."""
    named = list(network.named_parameters())
    weights = [name for name, parameter in named if not torch.isfinite(parameter).all()]
    gradients = [name for name, p in named if p.grad is not None and not torch.isfinite(p.grad).all()]
    return weights, gradients


def _roll_back(training: Guarded) -> str:
    """Load weights, averages and optimiser from the last whole checkpoint, and return its name.

    Clock, schedule and data order go on. Raises `Stopped` if there is no checkpoint.
    """
    folder = RunDir(training.trainer.default_root_dir).checkpoints
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
    """Return the first few names in a row, and how many more there are."""
    rest = len(names) - NAMED
    return ", ".join(map(printable, names[:NAMED])) + (f" and {rest} more" if rest > 0 else "")
