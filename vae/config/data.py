"""The data of a run or an evaluation: which images, how they are cut, and in which batches."""

from dataclasses import dataclass, replace

from vae.config.fields import Allowed, at_least, check_fields, choice, option, positive, within
from vae.errors import require

WANTED = {  # every source, and what data.root means to it; the embedded photographs need none
    "photos": "",
    "folder": "a folder of images",
    "list": "a .txt, .csv or .jsonl list of images",
    "huggingface": "a name on the hub, or a folder or file that datasets reads",
    "webdataset": "tar archives, as 'shards/{000000..000099}.tar'",
}
SOURCES = tuple(sorted(WANTED))
MAX_ASPECT = 3.0  # of a bucket's shape: longer side by shorter side

SHARE = Allowed("above 0 and at most 1", lambda value: 0 < value <= 1)
CROP = Allowed(
    "[low, high] with 0 < low <= high <= 1",
    lambda scale: scale is None or (len(scale) == 2 and 0 < scale[0] <= scale[1] <= 1),
)
DEPTH = Allowed("8 or 16", lambda bits: bits in (8, 16))
BUCKETS = Allowed(
    "16 or more each, and each once", lambda sides: all(one >= 16 for one in sides) and len(set(sides)) == len(sides)
)


@dataclass
class DataConfig:
    """Which images, how they are cut, and in which batches. docs/data.md shows each source by example."""

    source: str = option(
        "folder",
        "Where images come from. photos are embedded in the installation; the others read data.root.",
        allowed=choice(*SOURCES),
    )
    root: str | None = option(
        None,
        "The images: a folder, a list, a data set's name, or a pattern of tar archives.",
        may_change=True,  # they may have moved; their names and number must be the same
        chooses_images=True,
        is_path=True,
    )
    validation_root: str | None = option(
        None,
        "Images to validate on. null holds out a share of data.root.",
        may_change=True,
        chooses_images=True,
        is_path=True,
    )
    validation_fraction: float = option(
        0.02, "Share of data.root that is held out for validation.", allowed=SHARE, chooses_images=True
    )
    validation_at_least: int = option(
        16,
        "Hold out at least this many of the images of data.root, or a tenth of them where that is less.",
        allowed=at_least(1),
        chooses_images=True,
    )
    validation_images: int | None = option(
        256, "At most this many images are validated on.", allowed=at_least(1).or_null("all"), chooses_images=True
    )
    split: str = option("train", "The training split of a Hugging Face data set.", chooses_images=True)
    validation_split: str | None = option(None, "The validation split of a Hugging Face data set.", chooses_images=True)
    column: str | None = option(
        None, "The column that holds the image, in a list or a table. null finds it.", chooses_images=True
    )
    streaming: bool = option(
        False, "Read a Hugging Face data set shard by shard, without downloading all of it.", chooses_images=True
    )
    cache: str = option(
        "~/.cache/vae", "Folder for copies of remote shards.", may_change=True, chooses_images=True, is_path=True
    )
    cache_gigabytes: float = option(
        50.0, "Largest size of that folder.", unit="GB", allowed=positive("above 0"), may_change=True
    )
    open_shards: int = option(16, "Shards that are read at a time. More of them mix better.", allowed=at_least(1))
    resolution: int = option(
        256, "Side of the square images that the model sees.", unit="pixels", allowed=at_least(1), chooses_images=True
    )
    bits: int = option(8, "Bits of a channel that are kept.", allowed=DEPTH, chooses_images=True)
    latents: str | None = option(
        None,
        "A folder written by vae cache-latents. Training then shows each image's central square and encodes none.",
        may_change=True,
        is_path=True,
    )
    min_side: int | None = option(
        None,
        "Smaller images are skipped. null skips, in training, those that would have to be enlarged.",
        unit="pixels",
        allowed=at_least(1).or_null(),
        chooses_images=True,
    )
    crop_scale: list[float] | None = option(
        None, "Side of a random crop, as a share of the largest possible: [low, high]. null is [0.5, 1].", allowed=CROP
    )
    flip: bool = option(True, "Mirror half of the training images.")
    rotation: float = option(
        0.0,
        "Rotate training images by up to this angle.",
        unit="degrees",
        allowed=within(0, 45, "from 0 (off) to 45 degrees"),
    )
    colour: float = option(
        0.0,
        "Strength of random changes of brightness, contrast and saturation in training.",
        allowed=Allowed("from 0 (off) to below 1", lambda value: 0 <= value < 1),
    )
    bucket_resolutions: list[int] = option(
        [],
        "Train on images of any aspect ratio, in batches of one shape each, with about this side squared of area.",
        allowed=BUCKETS,
    )
    bucket_loss: float = option(
        0.1,
        "Largest share of an image's area that a bucket's crop may lose.",
        allowed=within(0.02, 0.5, "a share of the area from 0.02 to 0.5"),
    )
    batch_size: int = option(
        4,
        "Images of one process in one batch. It may change at resume with the number of processes, if "
        "images per update stay.",
        allowed=at_least(1),
        may_change=True,
    )
    validation_batch_size: int = option(8, "Images of one process in one batch of the validation.", allowed=at_least(1))
    workers: int | None = option(
        None,
        "Processes that decode images. null takes as many as there are cores, at most four.",
        allowed=at_least(0).or_null(),
        may_change=True,
    )
    max_corrupt: float = option(
        0.1,
        "A run stops when more than this share of the images, and more than ten, cannot be read.",
        allowed=within(0, 1, "a share from 0 to 1"),
        may_change=True,
    )

    def __post_init__(self) -> None:
        check_fields(self, "data.")
        self._check_source()
        self._check_buckets()
        self._check_latents()

    def of_folder(self, root: str) -> "DataConfig":
        """Return this config with every image of a folder as its images, all of them to validate on."""
        nowhere = {"split": "train", "validation_split": None, "column": None, "streaming": False}
        return replace(self, source="folder", root=root, validation_root=root, **nowhere)

    def _check_source(self) -> None:
        """Refuse settings that cannot take effect with this source."""
        hub = self.source == "huggingface"
        given = f"with data.source={self.source!r}"
        if not WANTED[self.source]:
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

    def _check_buckets(self) -> None:
        """Refuse settings that contradict buckets, and bucket settings without buckets."""
        sides = self.bucket_resolutions
        loss = self.bucket_loss
        require(bool(sides) or loss == DataConfig.bucket_loss, f"data.bucket_loss={loss}", "data.bucket_resolutions")

        small = self.min_side is None or not sides
        require(small, f"data.min_side={self.min_side}", "null with data.bucket_resolutions, which never enlarge")

        cut = self.crop_scale is not None
        require(not (sides and cut), f"data.crop_scale={self.crop_scale}", "null with data.bucket_resolutions")
        require(not (sides and self.rotation), f"data.rotation={self.rotation}", "0 with data.bucket_resolutions")

    def _check_latents(self) -> None:
        """Refuse transforms together with cached latents, which were encoded from the central square as it is."""
        if self.latents is None:
            return
        for key, only in {"crop_scale": None, "rotation": 0, "colour": 0, "bucket_resolutions": [], "bits": 8}.items():
            value = getattr(self, key)
            plain = "null" if only is None else only
            remedy = f"{plain}: what was encoded is shown as it is"
            require(value == only, f"data.{key}={value} with data.latents", remedy)


def bucket_shapes(resolution: int, loss: float, multiple: int) -> list[tuple[int, int]]:
    """Return the shapes (height, width) in pixels of the buckets of one resolution, from 1:3 to 3:1.

    Sides are multiples of `multiple`. There are few shapes: from the square outwards, each is as far from the last as
    `loss` and the multiples allow, so that a crop costs an image at most `loss` of its area.
    """
    side = max(1, round(resolution / multiple)) * multiple
    tall = sorted(_near_the_area(side, multiple), key=_aspect)

    shapes = [(side, side)]
    while (covered := _aspect(shapes[-1]) / (1.0 - loss)) < MAX_ASPECT:
        further = [shape for shape in tall if _aspect(shape) > _aspect(shapes[-1])]
        if not further:
            break

        # The farthest shape within reach keeps buckets few. Where the multiples leave a gap, the next one is taken.
        reachable = [shape for shape in further if _aspect(shape) * (1.0 - loss) <= covered]
        shapes.append(reachable[-1] if reachable else further[0])

    return sorted({*shapes, *((width, height) for height, width in shapes)})


def _near_the_area(side: int, multiple: int) -> list[tuple[int, int]]:
    """Return shapes higher than wide whose area is within a tenth of the square's."""
    sides = range(multiple, round(side * MAX_ASPECT), multiple)
    area = side * side
    return [(height, width) for height in sides for width in sides if width < height and _near(height * width, area)]


def _near(area: int, wanted: int) -> bool:
    """Return whether an area is within a tenth of the one wanted."""
    return abs(area / wanted - 1.0) <= 0.1


def _aspect(shape: tuple[int, int]) -> float:
    """Return height by width."""
    return shape[0] / shape[1]
