"""What was read from a path, and the autoencoder that was found in it."""

from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path

import torch

from vae.checkpoints.metadata import Notes
from vae.checkpoints.safe import State, WeightsError
from vae.models.autoencoder import AutoencoderConfig, AutoencoderKL


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
    layout: str  # "diffusers" or "ldm"
    weights: str  # "live" or "EMA"
    family: str | None  # of the diffusion model beside it; None where the file has none
    stated: bool  # whether the configuration came from a file, and not from the tensors
    notes: Notes

    @property
    def dtype(self) -> torch.dtype:
        """That of most of the weights."""
        sizes: Counter[torch.dtype] = Counter()
        for tensor in self.state.values():
            sizes[tensor.dtype] += tensor.numel()
        return sizes.most_common(1)[0][0]

    def build(self, dtype: torch.dtype = torch.float32) -> AutoencoderKL:
        """The model, in eval mode."""
        with torch.device("meta"):
            model = AutoencoderKL(self.config)
        state = {name: tensor.to(dtype) for name, tensor in self.state.items()}
        model.load_state_dict(state, strict=True, assign=True)
        return model.requires_grad_(True).eval()


def check_complete(found: Found) -> None:
    """Every tensor of the architecture, of its shape, and no other."""
    with torch.device("meta"):
        expected = AutoencoderKL(found.config).state_dict()
    missing, extra = sorted(expected.keys() - found.state.keys()), sorted(found.state.keys() - expected.keys())
    if missing or extra:
        raise WeightsError(
            f"{found.file}: {len(missing)} keys missing (first {missing[:3]}) and {len(extra)} unknown (first "
            f"{extra[:3]}) for this architecture; check that it is a complete KL autoencoder of its configuration"
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
