"""Changes to the number of latent channels of a trained KL autoencoder."""

from dataclasses import replace

import torch
from torch import Tensor, nn

from vae.config.model import AutoencoderConfig
from vae.errors import require
from vae.models.autoencoder_kl import INITIAL_LOGVAR

State = dict[str, Tensor]


def keeps_channels(asked: int | None, before: int | None) -> bool:
    """Say whether latents keep their channels: no other number is asked for than there was before."""
    return asked in (None, before)


def with_latent_channels(state: State, config: AutoencoderConfig, channels: int) -> tuple[State, AutoencoderConfig]:
    """Return the weights of an AutoencoderKL with `channels` latent channels, in float32, and their configuration.

    With more channels, the first ones are as before, and so are reconstructions of posterior means. The new ones see
    the image through random weights (from torch's generator) and have narrow posteriors, as a new encoder's do. The
    decoder's weights for them are zero, and learn.

    With fewer channels, the first ones are as before, and the decoder does without the others. Its first layer computes
    as if they were zero, except in the outermost rows and columns, where the bias of `post_quant_conv` meets padding.
    The decoder has to learn before it decodes well again.

    Raises InputError for another architecture.
    """
    given = f"latent_channels={channels} of a {config.architecture} autoencoder"
    require(config.architecture == "kl", given, "a KL autoencoder")

    change = _inflated if channels >= config.latent_channels else _sliced
    changed = change({name: tensor.float() for name, tensor in state.items()}, config.latent_channels, channels)
    one_scale = config.with_scale(config.scaling_factor, config.shift_factor)  # a list per channel fits no longer
    return changed, replace(one_scale, latent_channels=channels)


def _rows(known: int, channels: int) -> Tensor:
    """Return the places of the moments of the first `known` of `channels` channels: means, then log-variances."""
    return torch.cat([torch.arange(known), channels + torch.arange(known)])


def _inflated(state: State, before: int, after: int) -> State:
    """Add latent channels. The new ones have random means, narrow posteriors, and no effect on the decoder."""
    weight = state["encoder.conv_out.weight"]
    rows = _rows(before, after)

    # New means see the image through random weights. New log-variances have a constant bias only, which is narrow.
    of_moments = nn.Conv2d(weight.shape[1], 2 * after, 3).weight.detach()
    of_moments[after:] = 0.0
    bias = torch.tensor([0.0, INITIAL_LOGVAR]).repeat_interleave(after)

    of_moments[rows] = weight
    bias[rows] = state["encoder.conv_out.bias"]
    changed = state | {"encoder.conv_out.weight": of_moments, "encoder.conv_out.bias": bias}

    # In the 1x1 convolutions, which mix channels, the new channels pass through unchanged and unmixed.
    for name, places, size in (("quant_conv", rows, 2 * after), ("post_quant_conv", torch.arange(before), after)):
        if f"{name}.weight" in state:
            changed |= _identity(name, size)
            changed[f"{name}.weight"][places[:, None], places] = state[f"{name}.weight"]
            changed[f"{name}.bias"][places] = state[f"{name}.bias"]

    weight = state["decoder.conv_in.weight"]
    unheard = weight.new_zeros(len(weight), after - before, *weight.shape[2:])

    return changed | {"decoder.conv_in.weight": torch.cat([weight, unheard], dim=1)}


def _sliced(state: State, before: int, after: int) -> State:
    """Drop latent channels.

    The 1x1 convolutions mix the channels. So the 3x3 convolutions take the mixing over, and the 1x1 become identities.
    """
    changed = dict(state)
    rows = _rows(after, before)

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
    """Return the weights of a 1x1 convolution that changes nothing."""
    return {f"{name}.weight": torch.eye(channels)[:, :, None, None].clone(), f"{name}.bias": torch.zeros(channels)}
