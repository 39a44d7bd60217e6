"""The protocols by name: ours, and those that reproduce the tables of others, for 8-bit RGB.

Read in each author's evaluation script, and tested against the libraries that it calls; docs/evaluation.md says what
the scripts do beyond arithmetic, such as counting images twice, which is not reproduced.
"""

from vae.data import cuts
from vae.evaluation import pixels
from vae.evaluation.definition import Protocol
from vae.evaluation.pixels import Sees
from vae.metrics.ssim import ssim
from vae.metrics.variants import padded_ssim, uniform_ssim

SQUARE = "central square"
SAMPLE = "posterior sample, its noise a function of the seed and the image's index"
PRECISION = "float32, TF32 off (the authors' convolutions: as PyTorch decides)"
MEAN = "mean over images, infinities counted and left out"

DEFAULT_V1 = Protocol(
    name="default-v1",
    version=1,
    choices={
        "resize": "short side to the resolution, PIL bicubic, antialiased",
        "crop": "central square",
        "latents": "posterior mode",
        "arithmetic": "float32, TF32 off",
        "quantisation": "clamp to [-1, 1], round to uint8; every metric is of the uint8 images",
        "psnr": "per image over R, G and B, peak 255; mean over images, infinities counted and left out",
        "ssim": "Wang 2004: 11x11 Gaussian, sigma 1.5, inside the image, population covariance, mean of the channels",
        "lpips": "version 0.1, ImageNet features of AlexNet (lpips_alex) and VGG16 (lpips_vgg), images in [-1, 1]",
    },
    cut=cuts.pillow_bicubic,
    quantise=pixels.rounded,
    psnr_sees=Sees(pixels.rounded, 255.0),
    ssim_sees=Sees(pixels.rounded, 255.0),
    ssim=ssim,
    lpips_sees=pixels.rounded_to_signed,
    is_for_rgb=False,
)

LAVINAL712_V1 = Protocol(
    name="lavinal712-v1",
    version=1,
    choices={
        "resize": "short side to the resolution, PIL bilinear, antialiased",
        "crop": SQUARE,
        "latents": SAMPLE,
        "arithmetic": PRECISION,
        "quantisation": "PSNR and SSIM of floats clamped to [0, 1]; others but LPIPS of both truncated to uint8",
        "psnr": f"per image over R, G and B, of floats, peak 1; {MEAN}",
        "ssim": "scikit-image's default: flat 7x7 window inside the image, sample covariance; of floats, range 1",
        "lpips": "version 0.1, floats, reconstructions not clamped; the authors report lpips_vgg",
    },
    cut=cuts.lavinal712,
    quantise=pixels.truncated,
    psnr_sees=Sees(pixels.to_unit, 1.0),
    ssim_sees=Sees(pixels.to_unit, 1.0),
    ssim=uniform_ssim,
    lpips_sees=pixels.as_decoded,
    is_sampled=True,
)

LIGHTNINGDIT_V1 = Protocol(
    name="lightningdit-v1",
    version=1,
    choices={
        "resize": "short side to the resolution, torchvision bilinear of floats, antialiased (torchvision >= 0.17)",
        "crop": SQUARE,
        "latents": SAMPLE,
        "arithmetic": PRECISION,
        "quantisation": "clamp, round to uint8 for PSNR and others; SSIM of clamped floats, LPIPS of floats",
        "psnr": f"per image over R, G and B, of uint8, peak 255; {MEAN}",
        "ssim": "torchmetrics: 11x11 Gaussian over mirrored borders; of [-1, 1], range 2, where it is not Wang's SSIM",
        "lpips": "version 0.1, floats, reconstructions not clamped; the authors report lpips_vgg",
    },
    cut=cuts.lightningdit,
    quantise=pixels.rounded_by_lightningdit,
    psnr_sees=Sees(pixels.rounded_by_lightningdit, 255.0),
    ssim_sees=Sees(pixels.clamped, 2.0),
    ssim=padded_ssim,
    lpips_sees=pixels.as_decoded,
    is_sampled=True,
)

DC_AE_V1 = Protocol(
    name="dc-ae-v1",
    version=1,
    choices={
        "resize": "halved by PIL box while at least twice the resolution, then PIL bicubic (guided-diffusion)",
        "crop": SQUARE,
        "latents": "posterior mode (the authors' model has no posterior)",
        "arithmetic": PRECISION,
        "quantisation": "clamp, round to uint8; every metric is of the uint8 images",
        "psnr": f"per image over R, G and B, peak 255; {MEAN}",
        "ssim": "torchmetrics: 11x11 Gaussian over mirrored borders, population covariance, range 255",
        "lpips": "version 0.1, of the uint8 images; the authors report lpips_alex",
    },
    cut=cuts.dc_ae,
    quantise=pixels.rounded_by_dc_ae,
    psnr_sees=Sees(pixels.rounded_by_dc_ae, 255.0),
    ssim_sees=Sees(pixels.rounded_by_dc_ae, 255.0),
    ssim=padded_ssim,
    lpips_sees=pixels.rounded_by_dc_ae_to_signed,
)

SEED_VOKEN_V1 = Protocol(
    name="seed-voken-v1",
    version=1,
    choices={
        "resize": "short side to the resolution, PIL bilinear, antialiased",
        "crop": SQUARE,
        "latents": "posterior mode (the authors' models choose from a codebook)",
        "arithmetic": PRECISION,
        "quantisation": "clamp, truncate both to uint8 for PSNR, SSIM and others; LPIPS of clamped floats",
        "psnr": f"per image over R, G and B, of uint8, peak 255; {MEAN}",
        "ssim": "scikit-image's default: flat 7x7 window inside the image, sample covariance; of uint8",
        "lpips": "version 0.1, clamped floats; the authors report both",
    },
    cut=cuts.seed_voken,
    quantise=pixels.truncated,
    psnr_sees=Sees(pixels.truncated_to_unit, 1.0),
    ssim_sees=Sees(pixels.truncated_to_unit, 1.0),
    ssim=uniform_ssim,
    lpips_sees=pixels.clamped,
)

LDM_V1 = Protocol(
    name="ldm-v1",
    version=1,
    choices={
        "resize": "short side to the resolution, OpenCV bilinear, not antialiased",
        "crop": SQUARE,
        "latents": SAMPLE,
        "arithmetic": PRECISION,
        "quantisation": "not published; here clamp, truncate both to uint8, as the authors' scripts write pictures",
        "psnr": f"not published; here per image over R, G and B, of uint8, peak 255; {MEAN}",
        "ssim": "none in the authors' tables; here that of default-v1",
        "lpips": "the authors' PSIM is not published and not this; here version 0.1, of the uint8 images",
    },
    cut=cuts.ldm,
    quantise=pixels.truncated,
    psnr_sees=Sees(pixels.truncated, 255.0),
    ssim_sees=Sees(pixels.truncated, 255.0),
    ssim=ssim,
    lpips_sees=pixels.truncated_to_signed,
    is_sampled=True,
)

_ALL = (DEFAULT_V1, LAVINAL712_V1, LIGHTNINGDIT_V1, DC_AE_V1, SEED_VOKEN_V1, LDM_V1)
PROTOCOLS = {protocol.name: protocol for protocol in _ALL}
