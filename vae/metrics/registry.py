"""The registry of metrics: what each one says, in which unit, and which value is perfect."""

import math
from dataclasses import dataclass


@dataclass(frozen=True)
class Metric:
    """One metric. `ideal` is the value of a perfect reconstruction; `meaning` is one sentence for people.

    `badly` is a loss on one image that nobody overlooks, in the metric's unit. It is counted from `finest` where the
    image was better than that, because nobody sees a change beyond it.
    """

    title: str
    ideal: float
    meaning: str
    unit: str = ""
    digits: int = 4
    badly: float = math.inf
    finest: float | None = None

    def badness(self, value: float) -> float:
        """Return a number that is lower for better values, whichever way the metric itself points."""
        if self.ideal == math.inf:
            return -value
        return value if self.ideal == 0 else abs(value - self.ideal)  # KID may be a little below 0

    @property
    def direction(self) -> str:
        """The better direction: "higher", "lower", or "nearer to 1"."""
        if self.ideal == math.inf or self.title.endswith("SSIM"):
            return "higher"
        return "lower" if self.ideal == 0 else f"nearer to {self.ideal:g}"

    @property
    def arrow(self) -> str:
        """The better direction, as a sign."""
        return {"higher": "↑", "lower": "↓"}.get(self.direction, f"→ {self.ideal:g}")


ONE_GREY_LEVEL = 20 * math.log10(255)  # PSNR of an image that is off by one level everywhere
VISIBLE = 2.3  # CIELAB's just noticeable difference: Mahy, Van Eycken, Oosterlinck (1994)
PAIRED = {  # metrics of one image and its reconstruction
    "psnr": Metric(
        "PSNR", math.inf, "how small the squared error of the pixels is", "dB", 3, badly=3.0, finest=ONE_GREY_LEVEL
    ),
    "ssim": Metric("SSIM", 1.0, "how alike local structure is", badly=0.05),
    "ms_ssim": Metric("MS-SSIM", 1.0, "how alike structure is at five scales", badly=0.05),
    "lpips_alex": Metric("LPIPS (AlexNet)", 0.0, "how unlike the two look to AlexNet's features", badly=0.1),
    "lpips_vgg": Metric("LPIPS (VGG16)", 0.0, "how unlike the two look to VGG16's features", badly=0.1),
    "l1": Metric("L1", 0.0, "mean absolute error of the pixels, of 1 from black to white", digits=5, badly=0.02),
    "colour_shift": Metric("colour shift", 0.0, "how far the mean colour moved, in CIELAB", "ΔE", 3, badly=VISIBLE),
    "contrast": Metric(
        "contrast", 1.0, "the reconstruction's spread of lightness over the image's; below 1 is foggy", badly=0.1
    ),
    "saturation": Metric(
        "saturation", 1.0, "the reconstruction's mean chroma over the image's; below 1 is washed out", badly=0.1
    ),
    "sharpness": Metric(
        "sharpness", 1.0, "the reconstruction's mean gradient over the image's; below 1 is blurred", badly=0.2
    ),
    "high_frequency": Metric(
        "high frequencies", 1.0, "their energy over the image's; below 1 is lost detail", badly=0.5
    ),
}
OF_SETS = {  # metrics of all images and all reconstructions together
    "rfid": Metric("rFID", 0.0, "Frechet distance of Inception features, torch-fidelity's resizing", digits=3),
    "rfid_clean": Metric("rFID (clean)", 0.0, "Frechet distance of Inception features, clean-fid's resizing", digits=3),
    "kid": Metric("KID", 0.0, "kernel distance of the features of rfid, unbiased", digits=6),
    "kid_clean": Metric("KID (clean)", 0.0, "kernel distance of the features of rfid_clean, unbiased", digits=6),
}
METRICS = PAIRED | OF_SETS
CONVENTION_OF = {"rfid": "legacy", "kid": "legacy", "rfid_clean": "clean", "kid_clean": "clean"}  # of resizing
