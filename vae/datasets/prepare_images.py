"""Image shards, as `vae prepare` makes them: images are filtered, made smaller once and re-encoded into tar files.

Training reads these in place.
"""

import io
import re
import tarfile
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path, PurePosixPath
from typing import NamedTuple

from PIL import Image
from torch import Tensor

from vae.data.contact_sheet import to_picture
from vae.data.decode import EXTENSIONS, ImageError, image_size, open_image, reraise_machine_errors
from vae.data.shards import add_member
from vae.data.sources import Source
from vae.data.transforms import BICUBIC
from vae.datasets.jobs import Dropped, Job, Json, Made, make, unreadable
from vae.distributed import Advance, spread
from vae.errors import require

SUFFIX = ".tar"
SMALL, LONG, RESIZED, KEPT = "too small", "too long", "made smaller", "kept as they are"
FORMATS = {"jpeg": ".jpg", "webp": ".webp", "png": ".png"}
QUALITY = 95  # of JPEG and WebP
WEBP_MOST = 16383  # pixels, the largest height and width
STEM = 60  # characters of an image's own name that its member's name keeps


@dataclass(frozen=True)
class Treatment:
    """What is done to each image.

    The shorter side becomes at most `resolution` pixels. Images are dropped where it is below `min_side`, or where the
    longer side is more than `max_aspect` times as long. JPEG is 4:4:4; WebP is 4:2:0, since it has nothing else. With
    `keep`, images that need no resizing keep their bytes.
    """

    resolution: int | None = None
    min_side: int | None = None
    max_aspect: float | None = None
    format: str = "jpeg"
    quality: int | None = None
    keep: bool = False

    def __post_init__(self) -> None:
        require(self.format in FORMATS, f"--format {self.format}", f"one of {list(FORMATS)}")
        lossless = self.format == "png" and self.quality is not None
        require(not lossless, f"--quality {self.quality} with --format png", "it with jpeg or webp: PNG loses nothing")

        for name, low, high in (("quality", 1, 100), ("max_aspect", 1, 20), ("resolution", 8, 65535)):
            value = getattr(self, name)
            given = f"--{name.replace('_', '-')} {value}"
            require(value is None or low <= value <= high, given, f"{low} to {high}")

        reachable = self.min_side is None or self.min_side >= 1
        require(reachable, f"--min-side {self.min_side}", "1 or more")

    @property
    def described(self) -> Json:
        """The options of a job with this treatment: everything that decides the bytes."""
        chosen = QUALITY if self.quality is None and self.format != "png" else self.quality
        return {"made": "images"} | asdict(self) | {"quality": chosen}


class Treated(NamedTuple):
    """An image as it goes into the shard. `was` is what is counted of it."""

    data: bytes
    suffix: str
    was: str | None  # RESIZED, KEPT, or None where it was only encoded again


def prepare_shards(job: Job, treatment: Treatment, shards: Sequence[int], *, workers: int, advance: Advance) -> None:
    """Make the given shards of a job whose options are `treatment.described`, in `workers` processes."""
    spread(partial(_prepare_shard, job, treatment), shards, workers, advance)


def shrunk(pixels: Tensor, resolution: int | None) -> Image.Image:
    """Return a picture of uint8 pixels (3, H, W) whose shorter side is at most `resolution`. It is never enlarged.

    It is resized as `center_crop` would do it.
    """
    picture = to_picture(pixels)
    short = min(picture.size)
    if resolution is None or short <= resolution:
        return picture
    width, height = (int(resolution * side / short) for side in picture.size)
    return picture.resize((width, height), BICUBIC)


def _prepare_shard(job: Job, treatment: Treatment, shard: int, advance: Advance) -> None:
    """Make one shard: a tar file with the images that are not dropped."""

    def write(file: Path) -> Made:
        dropped: list[Dropped] = []
        counts = {RESIZED: 0, KEPT: 0}
        with tarfile.open(file, "w") as archive:
            for number in job.numbers(shard):
                done = _treated(job.source, number, treatment)
                if isinstance(done, Dropped):
                    dropped.append(done)
                else:
                    add_member(archive, _member(number, job.source.names[number], done.suffix), done.data)
                    if done.was is not None:
                        counts[done.was] += 1
                advance(1)
        return Made(len(job.numbers(shard)) - len(dropped), dropped, counts)

    make(job, shard, write)


def _treated(source: Source, number: int, treatment: Treatment) -> Treated | Dropped:
    """Read one image of the source, and return it as it goes into the shard, or why it does not."""
    name = source.names[number]
    try:
        with reraise_machine_errors(name):
            data = source.read(number)
            why = _unwanted(image_size(data, name), treatment)
            if why is not None:
                return Dropped(number, name, *why)

            data = data.read_bytes() if isinstance(data, Path) else data
            pixels = open_image(data, name=name)  # kept images are opened too, since they must be readable
            picture = shrunk(pixels, treatment.resolution)
            is_resized = picture.size != (pixels.shape[2], pixels.shape[1])

            if treatment.keep and not is_resized and not isinstance(data, Tensor):
                suffix = PurePosixPath(name).suffix.lower()  # it may be wrong: readers go by the content
                return Treated(data, suffix if suffix in EXTENSIONS else FORMATS["jpeg"], KEPT)
    except ImageError as error:
        return unreadable(source, number, error)
    return Treated(_encoded(picture, treatment), FORMATS[treatment.format], RESIZED if is_resized else None)


def _unwanted(size: tuple[int, int], treatment: Treatment) -> tuple[str, str] | None:
    """Return why an image of `size` (height, width) is not wanted, or None.

    The reason is its kind, and a sentence with what is wrong and what would allow it.
    """
    short, long = sorted(size)
    given = f"{size[1]}x{size[0]} pixels"
    if treatment.min_side is not None and short < treatment.min_side:
        return SMALL, f"{given}, below --min-side {treatment.min_side}"
    if treatment.max_aspect is not None and long > treatment.max_aspect * short:
        return LONG, f"{given}, more than --max-aspect {treatment.max_aspect:g} times its shorter side"

    after = long if treatment.resolution is None else long * min(1.0, treatment.resolution / short)
    if treatment.format == "webp" and after > WEBP_MOST:
        return LONG, f"{given}, more than the {WEBP_MOST} of WebP; --format jpeg takes it"
    return None


def _encoded(picture: Image.Image, treatment: Treatment) -> bytes:
    """Return the bytes of a picture in the format asked for."""
    stream = io.BytesIO()
    quality = treatment.described["quality"]
    if treatment.format == "jpeg":
        picture.save(stream, "JPEG", quality=quality, subsampling=0)
    elif treatment.format == "webp":
        picture.save(stream, "WEBP", quality=quality)
    else:
        picture.save(stream, "PNG")
    return stream.getvalue()


def _member(number: int, name: str, suffix: str) -> str:
    """Return the name of an image in the tar file.

    It is unlike any other, and has no dot before the suffix: WebDataset takes what stands before the first dot as a
    key.
    """
    stem = re.sub(r"[^A-Za-z0-9_-]+", "_", PurePosixPath(name).stem)[:STEM]
    return f"{number:08d}_{stem}{suffix}"
