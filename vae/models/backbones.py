"""The two ImageNet networks whose features LPIPS compares, as tables of their convolutions."""

from dataclasses import dataclass


@dataclass(frozen=True)
class Backbone:
    """The convolutions of one torchvision network as (index in `features`, in, out, kernel, stride, padding)."""

    torchvision_file: str
    package_file: str
    sha256: str  # of the tensors' bytes in the order of `keys`
    convolutions: tuple[tuple[int, int, int, int, int, int], ...]
    pools: dict[int, int]  # index of a max-pool (stride 2) -> its kernel
    taps: tuple[int, ...]  # indices of the ReLUs that LPIPS compares

    @property
    def keys(self) -> list[str]:
        return [f"features.{index}.{part}" for index, *_ in self.convolutions for part in ("weight", "bias")]


def _vgg16() -> tuple[tuple[tuple[int, int, int, int, int, int], ...], dict[int, int]]:
    convolutions, pools, index, channels = [], {}, 0, 3
    for width, depth in ((64, 2), (128, 2), (256, 3), (512, 3), (512, 3)):
        for _ in range(depth):
            convolutions.append((index, channels, width, 3, 1, 1))
            index, channels = index + 2, width
        pools[index] = 2
        index += 1
    return tuple(convolutions), pools


_VGG16_CONVOLUTIONS, _VGG16_POOLS = _vgg16()

BACKBONES = {
    "vgg": Backbone(
        torchvision_file="vgg16-397923af.pth",
        package_file="vgg16.ckpt",
        sha256="40acdda7c6b05249f81637b2571671ce938507c5f986db17af374cf62a2f42a6",
        convolutions=_VGG16_CONVOLUTIONS,
        pools=_VGG16_POOLS,
        taps=(3, 8, 15, 22, 29),
    ),
    "alex": Backbone(
        torchvision_file="alexnet-owt-7be5be79.pth",
        package_file="alexnet.ckpt",
        sha256="2b566cc3a4d6f0a7343701af22f461f1ac3dcd03a3ac28cce10968a1d3c85fdc",
        convolutions=(
            (0, 3, 64, 11, 4, 2),
            (3, 64, 192, 5, 1, 2),
            (6, 192, 384, 3, 1, 1),
            (8, 384, 256, 3, 1, 1),
            (10, 256, 256, 3, 1, 1),
        ),
        pools={2: 3, 5: 3, 12: 3},
        taps=(1, 4, 7, 9, 11),
    ),
}
