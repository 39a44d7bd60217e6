"""Three thousand damaged files: whatever the damage, one kind of error that names the file, or weights that hold.

The damage is done in an interpreter of its own (`python -m tests.weights.test_fuzz FOLDER`), so that a crash or a
hang is seen as one; the file that did it is left behind.
"""

import json
import random
import signal
import subprocess
import sys
import zipfile
from collections import Counter
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from tests.weights.confined import ROOT
from tests.weights.damage import damaged, flip
from vae.config.model import AutoencoderConfig
from vae.files import WeightsError
from vae.models.autoencoder_kl import AutoencoderKL
from vae.weights import read_autoencoder, save_autoencoder
from vae.weights.load import STEM

State = dict[str, torch.Tensor]

EACH = 600
PATIENCE = 10  # seconds for one file
SMALLEST = AutoencoderConfig(
    latent_channels=2,
    block_out_channels=[4],
    layers_per_block=1,
    norm_num_groups=4,
    use_quant_conv=False,
    use_post_quant_conv=False,
    mid_block_add_attention=False,
)
PLAIN, INDEX, PICKLED = f"{STEM}.safetensors", f"{STEM}.safetensors.index.json", f"{STEM}.bin"
SHARDS = (f"{STEM}-00001-of-00002.safetensors", f"{STEM}-00002-of-00002.safetensors")


def _shard(folder: Path, state: State) -> None:
    weight_map = {name: SHARDS[number % 2] for number, name in enumerate(state)}
    for shard in SHARDS:
        save_file({name: state[name].clone() for name in state if weight_map[name] == shard}, folder / shard)
    (folder / INDEX).write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))


def _torch(zipped: bool) -> Callable[[Path, State], None]:
    return lambda folder, state: torch.save(
        {"state_dict": state}, folder / PICKLED, _use_new_zipfile_serialization=zipped
    )


TARGETS: dict[str, tuple[Callable[[Path, State], None], tuple[str, ...]]] = {  # how to write it; what to damage
    "safetensors": (lambda folder, state: save_file(state, folder / PLAIN), (PLAIN,)),
    "torch zip": (_torch(True), (PICKLED,)),
    "torch legacy": (_torch(False), (PICKLED,)),
    "index and shards": (_shard, (INDEX, *SHARDS)),
    "config.json": (lambda folder, state: save_file(state, folder / PLAIN), ("config.json",)),
}


def _values() -> State:
    """No two of them alike."""
    torch.manual_seed(0)
    return {name: torch.randn(tensor.shape) for name, tensor in AutoencoderKL(SMALLEST).state_dict().items()}


def _write(folder: Path, kind: str, state: State) -> Path:
    save_autoencoder(AutoencoderKL(SMALLEST), folder)
    for weights in folder.glob("*.safetensors"):
        weights.unlink()
    TARGETS[kind][0](folder, state)
    return folder


def _verdict(folder: Path, kind: str, expected: State) -> str:
    try:
        found = read_autoencoder(folder).state
    except WeightsError as error:
        message = str(error)
        return "refused" if str(folder) in message and message.isprintable() else f"refused with {message!r}"
    except Exception as error:
        return f"{type(error).__name__}: {error}"
    if {name: tensor.shape for name, tensor in found.items()} != {n: t.shape for n, t in expected.items()}:
        return "loaded with other shapes"
    if not all(tensor.isfinite().all() for tensor in found.values()):
        return "loaded with values that are not finite"
    same = all(torch.equal(found[name], tensor) for name, tensor in expected.items())
    return "loaded" if same else "loaded with other values"


def _main(root: Path) -> None:
    torch.set_num_threads(1)
    expected, verdicts = _values(), {}
    for kind, (_, files) in TARGETS.items():
        folder, rng = _write(root / kind, kind, expected), random.Random(kind)
        counts: Counter[str] = Counter()
        for number in range(EACH):
            path = folder / files[number % len(files)]
            content = path.read_bytes()
            path.write_bytes(damaged(rng, content))
            signal.alarm(PATIENCE)
            counts[_verdict(folder, kind, expected)] += 1
            path.write_bytes(content)
        verdicts[kind] = counts
    print(json.dumps(verdicts))


@pytest.fixture(scope="module")
def verdicts(tmp_path_factory: pytest.TempPathFactory) -> dict[str, dict[str, int]]:
    folder = tmp_path_factory.mktemp("fuzz")
    command = [
        sys.executable,
        "-W",
        "error",
        "-W",
        "ignore::DeprecationWarning",
        "-m",
        "tests.weights.test_fuzz",
        str(folder),
    ]
    run = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert run.returncode == 0, f"{run.stderr}\nthe file that did it is in {folder}"
    return json.loads(run.stdout)


def test_three_thousand_were_tried_and_none_did_anything_else(verdicts):
    print(json.dumps(verdicts, indent=2))
    assert sum(sum(counts.values()) for counts in verdicts.values()) == 3_000


@pytest.mark.parametrize("kind", TARGETS)
def test_damage_is_refused_by_name_or_does_not_matter(verdicts, kind):
    unchecked = {"safetensors", "torch legacy", "index and shards"}  # formats without a checksum of their values
    allowed = {"refused", "loaded"} | ({"loaded with other values"} if kind in unchecked else set())
    assert verdicts[kind].keys() <= allowed
    assert verdicts[kind]["refused"] > EACH // 4


def test_no_single_flipped_bit_of_a_zip_changes_a_value(tmp_path):
    path = _write(tmp_path, "torch zip", _values()) / PICKLED
    content, rng = path.read_bytes(), random.Random(0)
    with zipfile.ZipFile(path) as archive:
        storages = [archive.read(name) for name in archive.namelist() if "/data/" in name]
    places = [content.index(storage) + rng.randrange(len(storage)) for storage in storages for _ in range(4)]
    for place in places:
        broken = bytearray(content)
        flip(rng, broken, place)
        path.write_bytes(broken)
        with pytest.raises(WeightsError, match="is not what was written there"):
            read_autoencoder(tmp_path)
    assert len(places) > 200


if __name__ == "__main__":
    _main(Path(sys.argv[1]))
