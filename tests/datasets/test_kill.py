"""Killed at any moment and given again until it is done, a command leaves what it leaves uninterrupted.

Some kills come before it has begun to write, most soon after it has.
"""

import os
import random
import select
import signal
import time
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from tests.datasets.conftest import contents
from vae.distributed import spread

KILLS = 10
ORPHANED = 20.0  # seconds that workers of a killed process may live on

COMMANDS = {
    "prepare": ("--resolution", 24, "--min-side", 20, "--shard-images", 1, "--workers", 1),
    "prepare by two workers": ("--resolution", 24, "--min-side", 20, "--shard-images", 1, "--workers", 2),
    "cache-latents": ("--resolution", 16, "--shard-images", 1, "--workers", 0, "--device", "cpu", "--flip"),
}


def start(call: Callable[..., int], arguments: tuple[object, ...]) -> tuple[int, int]:
    """(process, a pipe that ends when it and all that it started have ended). Forked: a new one would import torch."""
    here, there = os.pipe()
    child = os.fork()
    if child:
        os.close(there)
        return child, here
    status = 1
    try:
        torch.set_num_threads(1)
        status = call(*arguments)
    finally:
        os._exit(status)


def finish(child: int, pipe: int) -> int:
    _, status = os.waitpid(child, 0)
    has_ended = select.select([pipe], [], [], ORPHANED)[0]
    os.close(pipe)
    assert has_ended, "workers outlive the process that started them"
    return os.waitstatus_to_exitcode(status)


def listed(folder: Path) -> set[Path]:
    return set(folder.iterdir()) if folder.exists() else set()


@pytest.mark.parametrize("name", COMMANDS)
def test_ten_kills_at_random_moments_change_no_byte(call, pictures, model, tmp_path, name):
    (pictures / "broken.png").write_text("no image")
    command = name.partition(" ")[0]

    def given(folder: Path) -> tuple[object, ...]:
        return (command, *([model] if command == "cache-latents" else []), pictures, folder, *COMMANDS[name])

    torch.set_num_threads(1)
    assert call(*given(tmp_path / "warm")) == 0  # what is imported late would be so by every child
    began = time.monotonic()
    assert finish(*start(call, given(tmp_path / "whole"))) == 0
    lasted, whole = time.monotonic() - began, contents(tmp_path / "whole")
    assert len(whole) == 9 * 2 + len(("recipe.json", "dropped.jsonl", "index.json"))
    chance, kills, halfway, rounds = random.Random(name), 0, 0, 0
    while kills < KILLS:
        rounds += 1
        folder, status = tmp_path / f"killed {rounds}", -signal.SIGKILL
        while status != 0:
            before = listed(folder)
            child, pipe = start(call, given(folder))
            if kills < KILLS:
                deadline = time.monotonic() + chance.choice((0, 2, 2)) * lasted
                while time.monotonic() < deadline and listed(folder) == before:
                    time.sleep(0.001)
                time.sleep(chance.uniform(0, lasted / 4))
                os.kill(child, signal.SIGKILL)
            status = finish(child, pipe)
            assert status in (0, -signal.SIGKILL)
            kills += status != 0
            halfway += status != 0 and any(folder.glob("0*.json")) and not (folder / "index.json").exists()
        assert contents(folder) == whole
    print(f"{kills} kills in {rounds} rounds, {halfway} of them between the first receipt and the index")
    assert halfway


def test_workers_end_with_the_process_that_started_them():
    def endless(shard, advance):
        while True:
            advance(1)
            time.sleep(0.01)

    child, pipe = start(lambda: spread(endless, [0, 1], 2, int) or 0, ())
    time.sleep(0.5)
    os.kill(child, signal.SIGKILL)
    assert finish(child, pipe) == -signal.SIGKILL
