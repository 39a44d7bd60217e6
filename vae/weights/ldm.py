"""The single-file layout of the original LDM code, which the web UIs and ComfyUI read: names and shapes, nothing else.

The published converters assume four levels. The table here follows from the configuration and holds for any number.
"""

import torch
from torch import Tensor

from vae.config.model import AutoencoderConfig
from vae.files import State

RESNET = {"norm1": "norm1", "conv1": "conv1", "norm2": "norm2", "conv2": "conv2", "conv_shortcut": "nin_shortcut"}
ATTENTION = {"group_norm": "norm", "to_q": "q", "to_k": "k", "to_v": "v", "to_out.0": "proj_out"}
ENDS = {"conv_in": "conv_in", "conv_norm_out": "norm_out", "conv_out": "conv_out"}
SD_CHANNELS = 4  # latent channels of SD and SDXL, whose programs require quant convolutions; SD3 and FLUX have none


def ldm_names(config: AutoencoderConfig) -> dict[str, str]:
    """Return {our name: LDM's name} for every tensor that an autoencoder of this configuration can have."""
    last = len(config.block_out_channels) - 1
    layers: dict[str, str] = {"quant_conv": "quant_conv", "post_quant_conv": "post_quant_conv"}

    for half in ("encoder", "decoder"):
        layers |= {f"{half}.{ours}": f"{half}.{theirs}" for ours, theirs in ENDS.items()}
        layers |= _below(f"{half}.mid_block.attentions.0", f"{half}.mid.attn_1", ATTENTION)
        for j in range(2):
            layers |= _below(f"{half}.mid_block.resnets.{j}", f"{half}.mid.block_{j + 1}", RESNET)

    for i in range(last + 1):
        down, up = f"encoder.down.{i}", f"decoder.up.{last - i}"  # LDM counts `up` from the image side
        layers |= _level(f"encoder.down_blocks.{i}", down, config.layers_per_block)
        layers |= _level(f"decoder.up_blocks.{i}", up, config.layers_per_block + 1)
        layers[f"encoder.down_blocks.{i}.downsamplers.0.conv"] = f"{down}.downsample.conv"
        layers[f"decoder.up_blocks.{i}.upsamplers.0.conv"] = f"{up}.upsample.conv"

    return {f"{ours}.{part}": f"{theirs}.{part}" for ours, theirs in layers.items() for part in ("weight", "bias")}


def to_ldm(state: State, config: AutoencoderConfig) -> State:
    """Rename our tensors to LDM's names. Attention projections [C, C] become 1x1 convolutions [C, C, 1, 1].

    A network with SD's latent channels but without quant convolutions gets identities in their place, because the
    programs that load SD require them.
    """
    names = ldm_names(config)
    renamed = {names[name]: _as_convolution(name, tensor) for name, tensor in state.items()}
    dtype = next(iter(state.values())).dtype
    return renamed | {name: tensor.to(dtype) for name, tensor in _identities(config).items()}


def from_ldm(state: State, config: AutoencoderConfig) -> State:
    """Rename LDM's tensors to ours: the inverse of `to_ldm`, which also removes the identities that it added.

    A name that LDM does not have is kept, so that the strict check that follows reports it.
    """
    names = {theirs: ours for ours, theirs in ldm_names(config).items()}
    filling = _identities(config)
    state = {name: tensor for name, tensor in state.items() if name not in filling or not _same(tensor, filling[name])}
    renamed = {names.get(name, name): tensor for name, tensor in state.items()}
    return {name: as_linear(tensor) if is_projection(name) else tensor for name, tensor in renamed.items()}


def _identities(config: AutoencoderConfig) -> State:
    """Return 1x1 convolutions that do nothing, in place of the quant convolutions that an SD network here lacks."""
    missing = {"quant_conv": not config.use_quant_conv, "post_quant_conv": not config.use_post_quant_conv}
    identities: State = {}
    for name, width in (("quant_conv", 2 * SD_CHANNELS), ("post_quant_conv", SD_CHANNELS)):
        if config.latent_channels == SD_CHANNELS and missing[name]:
            identities[f"{name}.weight"] = torch.eye(width)[:, :, None, None]
            identities[f"{name}.bias"] = torch.zeros(width)
    return identities


def _same(tensor: Tensor, other: Tensor) -> bool:
    """Return whether two tensors have the same shape and, in float32, the same values."""
    return tensor.shape == other.shape and torch.equal(tensor.float(), other)


def _level(ours: str, theirs: str, resnets: int) -> dict[str, str]:
    """Return {our name: LDM's name} of the layers of one level with this many residual blocks."""
    names: dict[str, str] = {}
    for j in range(resnets):
        names |= _below(f"{ours}.resnets.{j}", f"{theirs}.block.{j}", RESNET)
        names |= _below(f"{ours}.attentions.{j}", f"{theirs}.attn.{j}", ATTENTION)
    return names


def _below(ours: str, theirs: str, inner: dict[str, str]) -> dict[str, str]:
    """Return {our name: LDM's name} of the `inner` layers of one block."""
    return {f"{ours}.{a}": f"{theirs}.{b}" for a, b in inner.items()}


def as_linear(weight: Tensor) -> Tensor:
    """Turn the weight of a 1x1 convolution [C, C, 1, 1] into that of a linear layer [C, C].

    Any other tensor is returned as it is, and the check of shapes reports it.
    """
    return weight[:, :, 0, 0] if weight.ndim == 4 and weight.shape[2:] == (1, 1) else weight


def is_projection(name: str) -> bool:
    """Return whether `name`, one of ours, is the weight of an attention projection."""
    return ".attentions." in name and ".to_" in name and name.endswith(".weight")


def _as_convolution(name: str, tensor: Tensor) -> Tensor:
    """Turn the weight of an attention projection into that of a 1x1 convolution; return others as they are."""
    return tensor[:, :, None, None] if is_projection(name) else tensor
