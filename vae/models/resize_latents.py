"""Other latent channels for a KL autoencoder that is trained already."""

from dataclasses import replace

import torch
from torch import Tensor, nn

from vae.config.model import AutoencoderConfig
from vae.errors import require
from vae.models.autoencoder_kl import INITIAL_LOGVAR

State = dict[str, Tensor]


def keeps_channels(asked: int | None, before: int | None) -> bool:
    """Whether latents stay as they are: no other channels were asked for than there were before."""
    return asked in (None, before)


def with_latent_channels(state: State, config: AutoencoderConfig, channels: int) -> tuple[State, AutoencoderConfig]:
    """The weights of an AutoencoderKL with so many latent channels, in float32, and their configuration.

    More of them: the first are as before, and so are reconstructions of posterior means. The new ones see the image
    through random weights (of torch's generator), narrowly, as a new encoder's do; the decoder's weights for them are
    zero, and learn. Fewer: the first are as before, and the decoder does without the others: its first layer as if they
    were zero, but for the outermost row and column, where the bias of `post_quant_conv` meets padding. It has to learn
    before it decodes well again. Raises InputError for another architecture.
    """
    require(config.architecture == "kl", f"latent_channels={channels} of a tiny autoencoder", "a KL autoencoder")
    change = _inflated if channels >= config.latent_channels else _sliced
    changed = change({name: tensor.float() for name, tensor in state.items()}, config.latent_channels, channels)
    return changed, replace(config, latent_channels=channels, latents_mean=None, latents_std=None)


def _rows(known: int, channels: int) -> Tensor:
    """Where the moments of the first `known` of so many channels stand: means first, then log-variances."""
    return torch.cat([torch.arange(known), channels + torch.arange(known)])


def _inflated(state: State, before: int, after: int) -> State:
    weight, rows = state["encoder.conv_out.weight"], _rows(before, after)
    of_moments = nn.Conv2d(weight.shape[1], 2 * after, 3).weight.detach()
    of_moments[after:] = 0.0
    bias = torch.tensor([0.0, INITIAL_LOGVAR]).repeat_interleave(after)
    of_moments[rows], bias[rows] = weight, state["encoder.conv_out.bias"]
    changed = state | {"encoder.conv_out.weight": of_moments, "encoder.conv_out.bias": bias}
    for name, places, size in (("quant_conv", rows, 2 * after), ("post_quant_conv", torch.arange(before), after)):
        if f"{name}.weight" in state:
            changed |= _identity(name, size)
            changed[f"{name}.weight"][places[:, None], places] = state[f"{name}.weight"]
            changed[f"{name}.bias"][places] = state[f"{name}.bias"]
    weight = state["decoder.conv_in.weight"]
    unheard = weight.new_zeros(len(weight), after - before, *weight.shape[2:])
    return changed | {"decoder.conv_in.weight": torch.cat([weight, unheard], dim=1)}


def _sliced(state: State, before: int, after: int) -> State:
    """The 1x1 convolutions mix channels: the 3x3 ones beside them take that over, and they are identities then."""
    changed, rows = dict(state), _rows(after, before)
    weight, bias = state["encoder.conv_out.weight"], state["encoder.conv_out.bias"]
    if "quant_conv.weight" in state:
        mixing = state["quant_conv.weight"][:, :, 0, 0]
        weight = torch.einsum("ij,jchw->ichw", mixing, weight)
        bias = mixing @ bias + state["quant_conv.bias"]
        changed |= _identity("quant_conv", 2 * after)
    changed |= {"encoder.conv_out.weight": weight[rows], "encoder.conv_out.bias": bias[rows]}
    weight, bias = state["decoder.conv_in.weight"], state["decoder.conv_in.bias"]
    if "post_quant_conv.weight" in state:
        mixing = state["post_quant_conv.weight"][:, :, 0, 0]
        bias = bias + torch.einsum("ichw,c->i", weight, state["post_quant_conv.bias"])
        weight = torch.einsum("ichw,cj->ijhw", weight, mixing)
        changed |= _identity("post_quant_conv", after)
    return changed | {"decoder.conv_in.weight": weight[:, :after].clone(), "decoder.conv_in.bias": bias}


def _identity(name: str, channels: int) -> State:
    """Of a 1x1 convolution."""
    return {f"{name}.weight": torch.eye(channels)[:, :, None, None].clone(), f"{name}.bias": torch.zeros(channels)}
