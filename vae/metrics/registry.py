"""Every metric by name: what it says, in which unit, and which value is perfect."""

import math
from dataclasses import dataclass


@dataclass(frozen=True)
class Metric:
    """`ideal` is the value of a perfect reconstruction; `meaning` is one sentence for people."""

    title: str
    ideal: float
    meaning: str
    unit: str = ""
    digits: int = 4

    def badness(self, value: float) -> float:
        """Lower is better, whichever way the metric itself points."""
        if self.ideal == math.inf:
            return -value
        return value if self.ideal == 0 else abs(value - self.ideal)  # KID may be a little below 0

    @property
    def direction(self) -> str:
        """ "higher", "lower", or "nearer to 1" """
        if self.ideal == math.inf or self.title.endswith("SSIM"):
            return "higher"
        return "lower" if self.ideal == 0 else f"nearer to {self.ideal:g}"

    @property
    def arrow(self) -> str:
        return {"higher": "↑", "lower": "↓"}.get(self.direction, f"→ {self.ideal:g}")


PAIRED = {  # of one image and its reconstruction
    "psnr": Metric("PSNR", math.inf, "how small the squared error of the pixels is", "dB", 3),
    "ssim": Metric("SSIM", 1.0, "how alike local structure is"),
    "ms_ssim": Metric("MS-SSIM", 1.0, "how alike structure is at five scales"),
    "lpips_alex": Metric("LPIPS (AlexNet)", 0.0, "how unlike the two look to AlexNet's features"),
    "lpips_vgg": Metric("LPIPS (VGG16)", 0.0, "how unlike the two look to VGG16's features"),
    "l1": Metric("L1", 0.0, "mean absolute error of the pixels, of 1 from black to white", digits=5),
    "colour_shift": Metric("colour shift", 0.0, "how far the mean colour moved, in CIELAB", "ΔE", 3),
    "contrast": Metric("contrast", 1.0, "the reconstruction's spread of lightness over the image's; below 1 is foggy"),
    "saturation": Metric("saturation", 1.0, "the reconstruction's mean chroma over the image's; below 1 is washed out"),
    "sharpness": Metric("sharpness", 1.0, "the reconstruction's mean gradient over the image's; below 1 is blurred"),
    "high_frequency": Metric("high frequencies", 1.0, "their energy over the image's; below 1 is lost detail"),
}
OF_SETS = {  # of all images and all reconstructions together
    "rfid": Metric("rFID", 0.0, "Frechet distance of Inception features, torch-fidelity's resizing", digits=3),
    "rfid_clean": Metric("rFID (clean)", 0.0, "Frechet distance of Inception features, clean-fid's resizing", digits=3),
    "kid": Metric("KID", 0.0, "kernel distance of the features of rfid, unbiased", digits=6),
    "kid_clean": Metric("KID (clean)", 0.0, "kernel distance of the features of rfid_clean, unbiased", digits=6),
}
METRICS = PAIRED | OF_SETS
CONVENTION_OF = {"rfid": "legacy", "kid": "legacy", "rfid_clean": "clean", "kid_clean": "clean"}  # of resizing
