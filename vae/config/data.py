"""The data of a run or an evaluation: which images, cut how, in which batches."""

from dataclasses import dataclass, field, replace

from vae.data.build import SOURCES, WANTED
from vae.errors import require


@dataclass
class DataConfig:
    """Which images, cut how, in which batches; docs/data.md has each source by example.

    `source` "photos" is embedded; "folder", "list", "huggingface" and "webdataset" read `root` and validate on
    `validation_root` (`validation_split`), or on a share of `root`. `min_side` leaves smaller images out (null: in
    training those that would have to be enlarged). `crop_scale` is a random crop's share of the largest possible, null
    for [0.5, 1]. `bucket_resolutions` makes batches of one shape each that lose `bucket_loss` of an image's area at
    most. With `latents`, a folder of `vae cache-latents`, training shows each image's central square and encodes none.
    A run stops when more than `max_corrupt` of the images, and ten, cannot be read. `workers` decode; null: as many as
    there are cores, at most four.
    """

    source: str = "folder"
    root: str | None = None
    validation_root: str | None = None
    validation_fraction: float = 0.02
    validation_images: int | None = 256
    split: str = "train"
    validation_split: str | None = None
    column: str | None = None
    streaming: bool = False
    cache: str = "~/.cache/vae"
    cache_gigabytes: float = 50.0
    open_shards: int = 16
    resolution: int = 256
    bits: int = 8
    latents: str | None = None
    min_side: int | None = None
    crop_scale: list[float] | None = None
    flip: bool = True
    rotation: float = 0.0
    colour: float = 0.0
    bucket_resolutions: list[int] = field(default_factory=list)
    bucket_loss: float = 0.1
    batch_size: int = 4
    validation_batch_size: int = 8
    workers: int | None = None
    max_corrupt: float = 0.1

    def __post_init__(self) -> None:
        require(self.source in SOURCES, f"data.source={self.source!r}", f"one of {sorted(SOURCES)}")
        self._check_source()
        for name in ("resolution", "batch_size", "validation_batch_size", "open_shards"):
            require(getattr(self, name) >= 1, f"data.{name}={getattr(self, name)}", "1 or more")
        limit = self.validation_images
        require(limit is None or limit >= 1, f"data.validation_images={limit}", "1 or more, or null for all")
        require(self.workers is None or self.workers >= 0, f"data.workers={self.workers}", "0 or more, or null")
        require(self.min_side is None or self.min_side >= 1, f"data.min_side={self.min_side}", "1 or more, or null")
        require(self.bits in (8, 16), f"data.bits={self.bits}", "8 or 16")
        require(self.cache_gigabytes > 0, f"data.cache_gigabytes={self.cache_gigabytes}", "above 0")
        fraction = self.validation_fraction
        require(0 < fraction <= 1, f"data.validation_fraction={fraction}", "above 0 and at most 1")
        require(0 <= self.max_corrupt <= 1, f"data.max_corrupt={self.max_corrupt}", "a share from 0 to 1")
        self._check_augmentation()
        self._check_buckets()
        self._check_latents()

    def of_folder(self, root: str) -> "DataConfig":
        """The same with every image of a folder, to validate on."""
        nowhere = {"split": "train", "validation_split": None, "column": None, "streaming": False}
        return replace(self, source="folder", root=root, validation_root=root, **nowhere)

    def _check_source(self) -> None:
        """What cannot take effect is refused."""
        hub, given = self.source == "huggingface", f"with data.source={self.source!r}"
        if self.source == "photos":
            unused = self.root is None and self.validation_root is None
            require(unused, f"data.root={self.root!r} {given}", "data=folder to read a folder")
        else:
            require(self.root is not None, "data.root is not set", f"{WANTED[self.source]}, e.g. data.root=photos")
        require(hub or not self.streaming, f"data.streaming=true {given}", "it with data=huggingface only")
        require(hub or self.split == "train", f"data.split={self.split!r} {given}", "it with data=huggingface only")
        require(hub or self.validation_split is None, f"data.validation_split {given}", "data.validation_root")
        require(not hub or self.validation_root is None, f"data.validation_root {given}", "data.validation_split")
        has_columns = hub or self.source == "list"
        require(has_columns or self.column is None, f"data.column {given}", "it with huggingface or list only")
        in_shards = self.source == "webdataset" or self.streaming
        unset = in_shards or self.open_shards == DataConfig.open_shards
        require(unset, f"data.open_shards {given}", "it with webdataset or data.streaming=true only")

    def _check_augmentation(self) -> None:
        scale = self.crop_scale
        ordered = scale is None or (len(scale) == 2 and 0 < scale[0] <= scale[1] <= 1)
        require(ordered, f"data.crop_scale={scale}", "[low, high] with 0 < low <= high <= 1")
        require(0 <= self.rotation <= 45, f"data.rotation={self.rotation}", "from 0 (off) to 45 degrees")
        require(0 <= self.colour < 1, f"data.colour={self.colour}", "from 0 (off) to below 1")

    def _check_buckets(self) -> None:
        sides, loss = self.bucket_resolutions, self.bucket_loss
        require(0.02 <= loss <= 0.5, f"data.bucket_loss={loss}", "a share of the area from 0.02 to 0.5")
        plain = all(side >= 16 for side in sides) and len(set(sides)) == len(sides)
        require(plain, f"data.bucket_resolutions={sides}", "16 or more each, and each once")
        require(bool(sides) or loss == DataConfig.bucket_loss, f"data.bucket_loss={loss}", "data.bucket_resolutions")
        small = self.min_side is None or not sides
        require(small, f"data.min_side={self.min_side}", "null with data.bucket_resolutions, which never enlarge")
        cut = self.crop_scale is not None
        require(not (sides and cut), f"data.crop_scale={self.crop_scale}", "null with data.bucket_resolutions")
        require(not (sides and self.rotation), f"data.rotation={self.rotation}", "0 with data.bucket_resolutions")

    def _check_latents(self) -> None:
        """They are of the central square as it is."""
        fixed = {"crop_scale": None, "rotation": 0, "colour": 0, "bucket_resolutions": [], "bits": 8}
        for key, only in fixed.items() if self.latents is not None else ():
            value = getattr(self, key)
            plain = "null" if only is None else only
            require(
                value == only, f"data.{key}={value} with data.latents", f"{plain}: what was encoded is shown as it is"
            )


MAX_ASPECT = 3.0


def bucket_shapes(resolution: int, loss: float, multiple: int) -> list[tuple[int, int]]:
    """Shapes from 1:3 to 3:1, sides multiples of `multiple`, so near to each other that a crop costs `loss` at most.

    Few of them: from the square outwards, each as far from the last as `loss` and the multiples allow.
    """
    side = max(1, round(resolution / multiple)) * multiple
    tall = sorted(_near_the_area(side, multiple), key=_aspect)
    shapes = [(side, side)]
    while (covered := _aspect(shapes[-1]) / (1.0 - loss)) < MAX_ASPECT:
        further = [shape for shape in tall if _aspect(shape) > _aspect(shapes[-1])]
        if not further:
            break
        within = [shape for shape in further if _aspect(shape) * (1.0 - loss) <= covered]
        shapes.append(within[-1] if within else further[0])
    return sorted({*shapes, *((width, height) for height, width in shapes)})


def _near_the_area(side: int, multiple: int) -> list[tuple[int, int]]:
    """Shapes higher than wide whose area is that of the square, by a tenth more or less."""
    sides = range(multiple, round(side * MAX_ASPECT), multiple)
    area = side * side
    return [(height, width) for height in sides for width in sides if width < height and _near(height * width, area)]


def _near(area: int, wanted: int) -> bool:
    return abs(area / wanted - 1.0) <= 0.1


def _aspect(shape: tuple[int, int]) -> float:
    return shape[0] / shape[1]
