"""Two thousand damaged images: whatever the damage, pixels or the one error; never a crash, a hang or another error.

The damage is done in an interpreter of its own (`python -m tests.data.test_fuzz_images FOLDER`), so that a crash or a
hang is seen as one; the file that did it is left behind.
"""

import json
import random
import signal
import subprocess
import sys
from collections import Counter
from pathlib import Path

import pytest
import torch

from tests.data.kinds import GOOD
from tests.weights.confined import ROOT
from tests.weights.damage import damaged
from vae.data.decode import ImageError, image_size, open_image

PATIENCE = 10  # seconds for one
KINDS = (
    "a JPEG",
    "a progressive JPEG without subsampling",
    "CMYK",
    "a PNG",
    "16-bit colour PNG",
    "an animated WebP",
    "an animated GIF",
    "several pages",
    "16-bit colour TIFF",
    "BMP",
)
TOTAL = 2_000


def _verdict(path: Path) -> str:
    try:
        pixels = open_image(path)
    except ImageError as error:
        message = str(error)
        return "refused" if message.startswith(str(path)) and message.isprintable() else f"refused with {message!r}"
    except Exception as error:
        return f"{type(error).__name__}: {error}"
    is_valid = pixels.dtype == torch.uint8 and pixels.ndim == 3 and len(pixels) == 3
    return "opened" if is_valid else f"opened as {pixels.dtype} {tuple(pixels.shape)}"


def _sized(path: Path) -> str:
    try:
        image_size(path)
    except ImageError:
        pass
    except Exception as error:
        return f"{type(error).__name__}: {error}"
    return "sized"


def _main(folder: Path) -> None:
    torch.set_num_threads(1)
    verdicts = {}
    for kind in KINDS:
        suffix, write, _ = GOOD[kind]
        path, rng = folder / f"damaged{suffix}", random.Random(kind)
        write(path)
        content, counts = path.read_bytes(), Counter[str]()
        for _ in range(TOTAL // len(KINDS)):
            path.write_bytes(damaged(rng, content))
            signal.alarm(PATIENCE)
            counts[_verdict(path)] += 1
            if (sized := _sized(path)) != "sized":
                counts[sized] += 1
        verdicts[kind] = counts
    print(json.dumps(verdicts))


@pytest.fixture(scope="module")
def verdicts(tmp_path_factory: pytest.TempPathFactory) -> dict[str, dict[str, int]]:
    folder = tmp_path_factory.mktemp("fuzz")
    command = [sys.executable, "-W", "error", "-W", "ignore::DeprecationWarning", "-m", "tests.data.test_fuzz_images"]
    run = subprocess.run([*command, str(folder)], cwd=ROOT, capture_output=True, text=True)
    assert run.returncode == 0, f"{run.stderr[-3000:]}\nthe file that did it is in {folder}"
    return json.loads(run.stdout)


def test_two_thousand_were_tried_and_none_did_anything_else(verdicts):
    print(json.dumps(verdicts, indent=2))
    assert sum(sum(counts.values()) for counts in verdicts.values()) == TOTAL


@pytest.mark.parametrize("kind", KINDS)
def test_damage_is_refused_by_name_or_gives_pixels(verdicts, kind):
    assert verdicts[kind].keys() <= {"opened", "refused"}
    assert verdicts[kind]["refused"] > 0


if __name__ == "__main__":
    _main(Path(sys.argv[1]))
