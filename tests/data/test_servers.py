"""Shards behind a server of HTTP that is not always well."""

import json
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest

from tests.data.forms import IMAGES, png, tars
from vae.config.data import DataConfig
from vae.data.build import open_sources
from vae.data.remote import Store
from vae.data.shards import open_shards
from vae.errors import InputError


class _Server(ThreadingHTTPServer):
    """Of the files in `folder`; `faults` are what becomes of the requests that come next."""

    daemon_threads = False
    folder: Path

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), _Handler)
        self.faults: list[str] = []
        self.requests: list[str] = []

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_port}"


class _Handler(BaseHTTPRequestHandler):
    server: _Server  # pyright: ignore[reportIncompatibleVariableOverride]

    def do_HEAD(self) -> None:
        self.do_GET()

    def do_GET(self) -> None:
        self.server.requests.append(self.path)
        fault = self.server.faults.pop(0) if self.server.faults else ""
        file = self.server.folder / self.path.partition("?")[0].lstrip("/")
        if fault == "dropped":
            self.close_connection = True
        elif fault.isdigit() or not file.is_file():
            self.send_error(int(fault or 404))
        else:
            data = file.read_bytes()
            self.send_response(200)
            self.send_header("Content-Length", str(len(data)))
            self.end_headers()
            if self.command == "GET":
                self.wfile.write(data[: len(data) // 2] if fault == "half" else data)
            self.close_connection = fault == "half"

    def log_message(self, format: str, *args: object) -> None:
        pass


@pytest.fixture
def server(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[_Server]:
    monkeypatch.setattr("vae.data.remote.WAIT_SECONDS", 0.0)
    with _Server() as server:
        server.folder = tmp_path / "far"
        thread = threading.Thread(target=server.serve_forever, args=(0.01,))
        thread.start()
        yield server
        server.shutdown()
        thread.join()


@pytest.mark.parametrize("fault", ["503", "dropped", "half"])
def test_a_server_that_fails_for_a_while_is_asked_again(fault, server, tmp_path):
    server.folder.mkdir()
    (server.folder / "a.tar").write_bytes(bytes(100_000))
    server.faults += [fault] * 3
    assert Store(tmp_path / "store", 1.0).local(f"{server.url}/a.tar?key=x").read_bytes() == bytes(100_000)


@pytest.mark.parametrize(
    ("faults", "told"), [(["404"] * 2, "404|FileNotFound"), (["403"] * 2, "403"), (["503"] * 99, "503")]
)
def test_a_server_that_refuses_is_named_by_the_url_and_its_answer(faults, told, server, tmp_path):
    server.folder.mkdir()
    (server.folder / "a.tar").touch()
    server.faults += faults
    with pytest.raises(InputError, match=rf"^{server.url}/a\.tar: cannot be fetched \(.*{told}.*; check the address"):
        Store(tmp_path / "store", 1.0).local(f"{server.url}/a.tar")
    assert len(server.requests) == (2 if len(faults) == 2 else 8)


@pytest.mark.parametrize("status", ["", "403"])
def test_shards_with_an_index_are_fetched_when_they_are_read_and_else_at_once(status, server, tmp_path):
    tars(server.folder)
    config = DataConfig(
        source="webdataset",
        root=f"{server.url}/train-{{0..2}}.tar",
        validation_root=f"{server.url}/val-0.tar",
        cache=str(tmp_path / "cache"),
    )
    server.faults += [status] * 2 if status else []
    training, _ = open_sources(config)
    assert sorted(training.read(index) for index in range(IMAGES)) == sorted(map(png, range(IMAGES)))
    entries = [{"name": f"train-{shard}.tar", "images": 4} for shard in range(3)]
    (server.folder / "index.json").write_text(json.dumps({"shards": entries}))
    server.requests.clear()
    indexed = open_shards([f"{server.url}/train-{shard}.tar" for shard in range(3)], Store(tmp_path / "b", 1.0), print)
    assert set(server.requests) == {"/index.json"}
    assert indexed.read(5) == training.read(5)
    assert set(server.requests) == {"/index.json", "/train-1.tar"}
