"""Names and shapes of a full SD 1.5 checkpoint without its autoencoder: U-Net and text encoder."""

from collections.abc import Iterator
from itertools import pairwise

Shapes = Iterator[tuple[str, tuple[int, ...]]]

WIDTHS = [320, 640, 1280, 1280]
TIME, CONTEXT = 1280, 768
UNET, TEXT = "model.diffusion_model.", "cond_stage_model.transformer.text_model."
UNET_PARAMETERS, TEXT_PARAMETERS = 859_520_964, 123_060_480  # as published


def full_checkpoint() -> dict[str, tuple[int, ...]]:
    shapes = {UNET + name: shape for name, shape in _unet()} | {TEXT + name: shape for name, shape in _text_encoder()}
    return shapes | {name: (1000,) for name in ("betas", "alphas_cumprod", "sqrt_alphas_cumprod")}


def _unet() -> Shapes:
    yield from _layer("time_embed.0", TIME, WIDTHS[0])
    yield from _layer("time_embed.2", TIME, TIME)
    yield from _layer("input_blocks.0.0", WIDTHS[0], 4, 3, 3)
    skips, number, last = [WIDTHS[0]], 1, len(WIDTHS) - 1
    for level, (before, width) in enumerate(pairwise([WIDTHS[0], *WIDTHS])):
        for given in (before, width):
            yield from _resnet(f"input_blocks.{number}.0", given, width)
            if level < last:
                yield from _transformer(f"input_blocks.{number}.1", width)
            skips.append(width)
            number += 1
        if level < last:
            yield from _layer(f"input_blocks.{number}.0.op", width, width, 3, 3)
            skips.append(width)
            number += 1
    yield from _resnet("middle_block.0", TIME, TIME)
    yield from _transformer("middle_block.1", TIME)
    yield from _resnet("middle_block.2", TIME, TIME)
    yield from _output_blocks(skips)
    yield from _norm("out.0", WIDTHS[0])
    yield from _layer("out.2", 4, WIDTHS[0], 3, 3)


def _output_blocks(skips: list[int]) -> Shapes:
    number, here, last = 0, WIDTHS[-1], len(WIDTHS) - 1
    for level in range(last, -1, -1):
        width = WIDTHS[level]
        for block in range(3):
            yield from _resnet(f"output_blocks.{number}.0", here + skips.pop(), width)
            here = width
            if level < last:
                yield from _transformer(f"output_blocks.{number}.1", width)
            if level and block == 2:
                yield from _layer(f"output_blocks.{number}.{2 if level < last else 1}.conv", width, width, 3, 3)
            number += 1


def _resnet(name: str, given: int, width: int) -> Shapes:
    yield from _norm(f"{name}.in_layers.0", given)
    yield from _layer(f"{name}.in_layers.2", width, given, 3, 3)
    yield from _layer(f"{name}.emb_layers.1", width, TIME)
    yield from _norm(f"{name}.out_layers.0", width)
    yield from _layer(f"{name}.out_layers.3", width, width, 3, 3)
    if given != width:
        yield from _layer(f"{name}.skip_connection", width, given, 1, 1)


def _transformer(name: str, width: int) -> Shapes:
    yield from _norm(f"{name}.norm", width)
    yield from _layer(f"{name}.proj_in", width, width, 1, 1)
    block = f"{name}.transformer_blocks.0"
    for attention, context in (("attn1", width), ("attn2", CONTEXT)):
        yield f"{block}.{attention}.to_q.weight", (width, width)
        yield f"{block}.{attention}.to_k.weight", (width, context)
        yield f"{block}.{attention}.to_v.weight", (width, context)
        yield from _layer(f"{block}.{attention}.to_out.0", width, width)
    yield from _layer(f"{block}.ff.net.0.proj", 8 * width, width)
    yield from _layer(f"{block}.ff.net.2", width, 4 * width)
    for norm in ("norm1", "norm2", "norm3"):
        yield from _norm(f"{block}.{norm}", width)
    yield from _layer(f"{name}.proj_out", width, width, 1, 1)


def _text_encoder() -> Shapes:
    yield "embeddings.token_embedding.weight", (49408, CONTEXT)
    yield "embeddings.position_embedding.weight", (77, CONTEXT)
    for layer in (f"encoder.layers.{number}" for number in range(12)):
        for projection in ("q_proj", "k_proj", "v_proj", "out_proj"):
            yield from _layer(f"{layer}.self_attn.{projection}", CONTEXT, CONTEXT)
        yield from _layer(f"{layer}.mlp.fc1", 4 * CONTEXT, CONTEXT)
        yield from _layer(f"{layer}.mlp.fc2", CONTEXT, 4 * CONTEXT)
        yield from _norm(f"{layer}.layer_norm1", CONTEXT)
        yield from _norm(f"{layer}.layer_norm2", CONTEXT)
    yield from _norm("final_layer_norm", CONTEXT)


def _layer(name: str, out: int, *rest: int) -> Shapes:
    yield f"{name}.weight", (out, *rest)
    yield f"{name}.bias", (out,)


def _norm(name: str, width: int) -> Shapes:
    yield from _layer(name, width)
