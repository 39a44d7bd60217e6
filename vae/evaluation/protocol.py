"""How numbers are made: named, versioned and hashed, so that two tables can be told apart."""

import hashlib
import json
from dataclasses import asdict, dataclass


@dataclass(frozen=True)
class Protocol:
    """Every choice that moves a metric. `version` changes whenever the arithmetic behind one of the words does."""

    name: str
    version: int
    resize: str
    crop: str
    latents: str
    arithmetic: str
    quantisation: str
    psnr: str
    ssim: str
    lpips: str

    @property
    def sha256(self) -> str:
        return hashlib.sha256(json.dumps(asdict(self), sort_keys=True).encode()).hexdigest()[:12]

    def __str__(self) -> str:
        choices = {key: value for key, value in asdict(self).items() if key not in ("name", "version")}
        listed = "\n".join(f"  {key:<12} {value}" for key, value in choices.items())
        return f"protocol {self.name}, version {self.version}, sha256 {self.sha256}\n{listed}"


DEFAULT_V1 = Protocol(
    name="default-v1",
    version=1,
    resize="short side to the resolution, PIL bicubic, antialiased",
    crop="central square",
    latents="posterior mode",
    arithmetic="float32, TF32 off",
    quantisation="clamp to [-1, 1], round to uint8; every metric is of the uint8 images",
    psnr="per image over R, G and B, peak 255; mean over images, infinities counted and left out",
    ssim="Wang 2004: 11x11 Gaussian, sigma 1.5, inside the image, population covariance, mean of the channels",
    lpips="version 0.1, ImageNet features of AlexNet (lpips_alex) and VGG16 (lpips_vgg), images in [-1, 1]",
)
