"""What was read from a path, and the autoencoder that was found in it."""

from collections import Counter
from dataclasses import dataclass, field, replace
from pathlib import Path

import torch

from vae.checkpoints.families import FAMILIES, families_of, is_published_network
from vae.checkpoints.metadata import ASSUMED_GROUPS, Notes
from vae.checkpoints.safe import State, WeightsError
from vae.checkpoints.writing import check_range
from vae.errors import require
from vae.models.architectures import build_autoencoder
from vae.models.autoencoder import AutoencoderConfig
from vae.models.interface import Autoencoder


@dataclass(frozen=True)
class Source:
    """`file`, its tensors, and what stands beside or inside them, if anything does."""

    file: Path
    state: State
    config: AutoencoderConfig | None = None
    notes: Notes = field(default_factory=Notes)


@dataclass(frozen=True)
class Found:
    """An autoencoder's tensors under our names, and what was learned on the way."""

    file: Path
    state: State
    config: AutoencoderConfig
    layout: str  # "diffusers", "ldm" or "taesd"
    weights: str  # "live" or "EMA"
    family: str | None  # of the diffusion model beside it, or whose latents a tiny one has; None where nothing tells
    stated: bool  # whether the configuration came from a file, and not from the tensors
    others: int  # tensors in the file beside these
    notes: Notes

    @property
    def kind(self) -> str:
        """Live or EMA: which of its weights they are, or, in an export of ours, which were put there."""
        return str(self.notes.training.get("weights", self.weights))

    @property
    def scale_is_known(self) -> bool:
        """Not of a standalone file: SD and SDXL, or SD3 and FLUX, look alike there. Tiny ones need no scale."""
        return self.config.scale_is_known

    @property
    def groups_are_known(self) -> bool:
        """Not of tensors alone, where no family says that they are of its network: they fit any number of groups."""
        return not self.notes.architecture.keys() & ASSUMED_GROUPS.keys()

    def with_groups_assumed(self, assumed: bool) -> "Found":
        """The same with the mark, which goes into every file that is written of it, or without."""
        kept = {name: value for name, value in self.notes.architecture.items() if name not in ASSUMED_GROUPS}
        return replace(self, notes=replace(self.notes, architecture=kept | (ASSUMED_GROUPS if assumed else {})))

    def of_family(self, family: str) -> "Found":
        """The same with the constants of `family`, which somebody who knows has named."""
        config = of_family(self.config, family)
        if config.architecture == "tiny":
            return replace(self, family=family)
        told = replace(self, config=config, stated=True)
        return told.with_groups_assumed(False) if is_published_network(config) else told

    @property
    def dtype(self) -> torch.dtype:
        """That of most of the weights."""
        sizes: Counter[torch.dtype] = Counter()
        for tensor in self.state.values():
            sizes[tensor.dtype] += tensor.numel()
        return sizes.most_common(1)[0][0]

    def cast(self, target: Path, dtype: torch.dtype | None) -> "Found":
        """The weights as `target` will have them; refused where `dtype` cannot hold them."""
        check_range(target, self.state, dtype)
        return replace(self, state={name: tensor.to(dtype or tensor.dtype) for name, tensor in self.state.items()})

    def build(self, dtype: torch.dtype = torch.float32) -> Autoencoder:
        """The model, in eval mode."""
        with torch.device("meta"):
            model = build_autoencoder(self.config)
        state = {name: tensor.to(dtype) for name, tensor in self.state.items()}
        model.load_state_dict(state, strict=True, assign=True)
        return model.requires_grad_(True).eval()


def of_family(config: AutoencoderConfig, family: str) -> AutoencoderConfig:
    """`config` with the constants of `family`; raises InputError where its latents cannot be that one's.

    A tiny autoencoder has none: its latents are those that the family's diffusion models see.
    """
    fitting = families_of(config)
    require(family in fitting, f"family={family!r}", f"one of {fitting} for this network")
    return config if config.architecture == "tiny" else config.with_scale(*FAMILIES[family])


def check_complete(found: Found) -> None:
    """Every tensor of the architecture, of its shape, and no other."""
    with torch.device("meta"):
        expected = build_autoencoder(found.config).state_dict()
    kind = {"kl": "KL", "tiny": "tiny"}[found.config.architecture]
    missing, extra = sorted(expected.keys() - found.state.keys()), sorted(found.state.keys() - expected.keys())
    if missing or extra:
        raise WeightsError(
            f"{found.file}: {len(missing)} keys missing (first {missing[:3]}) and {len(extra)} unknown (first "
            f"{extra[:3]}) for this architecture; check that it is a complete {kind} autoencoder of its configuration"
        )
    for name, tensor in found.state.items():
        shape = expected[name].shape
        if tensor.shape != shape:
            raise WeightsError(
                f"{found.file}: {name} is {tuple(tensor.shape)}, expected {tuple(shape)}; it is of another architecture"
            )
        if not tensor.is_floating_point():
            raise WeightsError(f"{found.file}: {name} is {tensor.dtype}, expected floating-point weights")


def check_finite(found: Found) -> None:
    broken = [name for name, tensor in found.state.items() if not tensor.float().isfinite().all()]
    if broken:
        raise WeightsError(
            f"{found.file}: {len(broken)} tensors hold NaN or infinite values (first {broken[:3]}); "
            f"the training that wrote it has diverged, use an earlier file"
        )
