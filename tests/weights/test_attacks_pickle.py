"""Pickles that would run code run none, in any container; harmless ones of other programs load bit for bit."""

import argparse
import copyreg
import pathlib
import pickle
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pytest
import torch
from lightning.pytorch.callbacks import EarlyStopping, ModelCheckpoint
from omegaconf import OmegaConf

from tests.weights.opcodes import (
    PROTOCOL_4,
    State,
    call,
    name_of,
    named,
    small_zip,
    storage,
    tensor,
    torch_legacy,
    torch_zip,
    value,
)
from vae.config.model import AutoencoderConfig
from vae.files import WeightsError
from vae.models.autoencoder_kl import AutoencoderKL
from vae.weights import read_autoencoder
from vae.weights.ldm import to_ldm

TOUCH = "touch '{}'"
EXTENSION = 0xF7  # a code that nobody has registered
SCRIPT, NESTED, ARRAY = "payload.py", "payload.pt", "payload.npy"


@pytest.fixture
def ldm(tiny: AutoencoderConfig) -> State:
    return {name: t.contiguous() for name, t in to_ldm(dict(AutoencoderKL(tiny).state_dict()), tiny).items()}


@pytest.fixture
def sentinel(tmp_path: Path) -> Iterator[Path]:
    """A file that exists once any payload has run, and all that the payloads need to do so."""
    path = tmp_path / "executed"
    attack = call(name_of("os", "system"), TOUCH.format(path))
    (tmp_path / SCRIPT).write_text(f"open({str(path)!r}, 'w').close()")
    (tmp_path / NESTED).write_bytes(torch_zip({}, attack))
    np.save(tmp_path / ARRAY, np.array([None], dtype=object))
    saved = (tmp_path / ARRAY).read_bytes()
    (tmp_path / ARRAY).write_bytes(saved[: saved.index(b"\n") + 1] + PROTOCOL_4 + attack + b".")
    copyreg.add_extension("os", "mkdir", EXTENSION)
    yield path
    copyreg.remove_extension("os", "mkdir", EXTENSION)


PARTIAL = name_of("functools", "partial")
PAYLOADS: dict[str, Callable[[Path], bytes]] = {  # pickle operations that leave one object on the stack
    "os.system": lambda s: call(name_of("os", "system"), TOUCH.format(s)),
    "subprocess by STACK_GLOBAL": lambda s: call(
        value("subprocess") + value("check_call") + b"\x93", ["touch", str(s)]
    ),
    "eval by INST": lambda s: b"(" + value(f"open({str(s)!r}, 'w').close()") + b"ibuiltins\neval\n",
    "exec by OBJ": lambda s: b"(" + name_of("builtins", "exec") + value((s.parent / SCRIPT).read_text()) + b"o",
    "mkdir by EXT1": lambda s: call(b"\x82" + bytes([EXTENSION]), str(s)),
    "Path.touch by a dotted name": lambda s: (
        value("pathlib") + value("Path.touch") + b"\x93" + call(name_of("pathlib", "Path"), str(s)) + b"\x85R"
    ),
    "shutil.copy": lambda s: call(name_of("shutil", "copy"), str(s.parent / SCRIPT), str(s)),
    "runpy": lambda s: call(name_of("runpy", "run_path"), str(s.parent / SCRIPT)),
    "torch.load within, by NEWOBJ_EX": lambda s: (
        PARTIAL
        + b"("
        + name_of("torch", "load")
        + value(str(s.parent / NESTED))
        + b"t"
        + value({"weights_only": False})
        + b"\x92)R"
    ),
    "numpy.load within": lambda s: call(name_of("numpy", "load"), str(s.parent / ARRAY), None, True),
    "methodcaller of an import": lambda s: (
        call(name_of("operator", "methodcaller"), "system", TOUCH.format(s))
        + call(name_of("importlib", "import_module"), "os")
        + b"\x85R"
    ),
    "partial by BUILD": lambda s: (
        PARTIAL
        + name_of("builtins", "len")
        + b"\x85\x81("
        + name_of("os", "system")
        + value((TOUCH.format(s),))
        + b"}Ntb)R"
    ),
}


CONTAINERS: dict[str, tuple[str, Callable[[State, bytes], bytes]]] = {
    "torch zip": ("vae.pt", torch_zip),
    "torch legacy": ("vae.ckpt", torch_legacy),
    "pickle alone": ("vae.pkl", lambda _, payload: PROTOCOL_4 + payload + b"."),
    "renamed to safetensors": ("vae.safetensors", torch_zip),
}
ATTACKS = [(payload, container) for payload in PAYLOADS for container in CONTAINERS]


@pytest.mark.parametrize("payload", PAYLOADS)
def test_every_payload_runs_where_nothing_stops_it(sentinel, payload):
    pickle.loads(PROTOCOL_4 + PAYLOADS[payload](sentinel) + b".")
    assert sentinel.exists()


def test_there_are_forty_eight_attacks():
    assert len(ATTACKS) == len(set(ATTACKS)) == 48


@pytest.mark.parametrize(("payload", "container"), ATTACKS, ids=[", ".join(attack) for attack in ATTACKS])
def test_no_payload_runs_and_weights_beside_it_load_bit_for_bit(sentinel, tiny, ldm, payload, container):
    name, wrap = CONTAINERS[container]
    path = sentinel.parent / name
    path.write_bytes(wrap(ldm, PAYLOADS[payload](sentinel)))
    if container == "pickle alone":
        with pytest.raises(WeightsError, match=name) as error:
            read_autoencoder(path, config=tiny)
        assert str(path) in str(error.value)
    else:
        _assert_holds(path, tiny, ldm)
    assert not sentinel.exists()


HARMLESS: dict[str, Callable[[State], object]] = {
    "Lightning's callbacks as keys": lambda s: {
        "state_dict": s,
        "callbacks": {ModelCheckpoint: {"best_model_score": torch.tensor(0.5)}, EarlyStopping: {"wait_count": 2}},
    },
    "an OmegaConf object": lambda s: {
        "hyper_parameters": OmegaConf.create({"lr": 1e-4, "betas": [0.5, 0.9], "name": "${oc.env:HOME}"}),
        "state_dict": s,
    },
    "a Namespace": lambda s: {"args": argparse.Namespace(lr=1e-4, nested=argparse.Namespace(gpus=[0, 1])), "model": s},
    "paths, as values and keys": lambda s: {"seen": {pathlib.Path("a.png"): pathlib.PureWindowsPath("b")}, "model": s},
    "numpy scalars and arrays": lambda s: {
        "best": np.float64(0.5),
        "history": np.arange(12.0).reshape(3, 4),
        "kind": np.dtype("int16"),
        "generator": np.random.RandomState(0).get_state(),
        "model": s,
    },
}


@pytest.mark.parametrize("make", HARMLESS.values(), ids=HARMLESS.keys())
@pytest.mark.parametrize("zipped", [True, False], ids=["zip", "legacy"])
def test_objects_of_other_programs_beside_the_weights_do_no_harm(tmp_path, tiny, ldm, make, zipped):
    path = tmp_path / "legacy.ckpt"
    torch.save(make(ldm), path, _use_new_zipfile_serialization=zipped)
    with pytest.raises(pickle.UnpicklingError, match="Weights only load failed"):
        torch.load(path, weights_only=True)
    _assert_holds(path, tiny, ldm)


IMPOSSIBLE: dict[str, bytes] = {  # each a whole pickle
    "a view whose storage is taken away": named(tensor((2, 2), (2, 1)) + value({"storage": None}) + b"b"),
    "a view whose size is replaced": named(tensor((2, 2), (2, 1)) + value({"size": {"a": 1}}) + b"b"),
    "a storage whose type is replaced": named(tensor((2, 2), (2, 1), storage() + value({"dtype": "huge"}) + b"b")),
    "a dictionary whose methods are replaced": call(name_of("collections", "OrderedDict"))
    + value({"items": None, "values": 1, "keys": 1})
    + b"b.",
    "a negative stride": named(tensor((2, 2), (-2, 1))),
    "a stride beyond 64 bits": named(tensor((1, 2), (10**30, 1))),
    "an empty size beyond 64 bits": named(tensor((0, 10**30), (1, 1))),
    "another tensor's empty size beyond 64 bits": named(
        tensor((2, 2), (2, 1)) + b"s" + value("other") + tensor((0, 2**62, 8), (1, 1, 1))
    ),
    "sizes that are not numbers": named(tensor(("2", None), (2, 1))),  # pyright: ignore[reportArgumentType]
    "more strides than sizes": named(tensor((2,), (2, 1))),
    "a storage that is not there": named(tensor((2, 2), (2, 1), storage(value("../1")))),
    "a storage without a name": named(tensor((2, 2), (2, 1), storage(b"]"))),
    "an extension that nobody registered": named(b"\x82\xf6"),
    "an empty stack": PROTOCOL_4 + b"R.",
    "no end": PROTOCOL_4 + b"}",
    "a protocol of the future": b"\x80\x09}.",
}


@pytest.mark.parametrize("pickled", IMPOSSIBLE.values(), ids=IMPOSSIBLE.keys())
def test_impossible_pickles_are_refused_by_the_file(tmp_path, tiny, pickled):
    path = tmp_path / "vae.pt"
    path.write_bytes(small_zip(pickled))
    with pytest.raises(WeightsError) as error:
        read_autoencoder(path, config=tiny)
    assert str(path) in str(error.value)


def _assert_holds(path: Path, config: AutoencoderConfig, expected: State) -> None:
    found = to_ldm(read_autoencoder(path, config=config).state, config)
    assert found.keys() == expected.keys()
    assert all(torch.equal(found[name], tensor) for name, tensor in expected.items())
