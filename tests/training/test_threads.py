"""How many threads a CPU has in training: those that are asked for, or those that are not slower than fewer."""

from dataclasses import replace

import pytest
import torch

from tests.conftest import read_json, without_adversary
from vae import distributed
from vae.distributed import sensible_threads
from vae.training.plan import show
from vae.training.plan.plan import plan
from vae.training.train import train


@pytest.fixture
def threads(monkeypatch):
    """What is set as the number of threads, which the machine itself need not have."""
    given = [8]
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    monkeypatch.setattr(torch, "get_num_threads", lambda: given[-1])
    monkeypatch.setattr(torch, "set_num_threads", given.append)
    return given


@pytest.mark.parametrize(
    ("seconds", "expected"),
    [
        ({8: 1.0, 4: 1.8, 2: 3.0, 1: 6.0}, 8),  # an idle machine
        ({8: 1.0, 4: 0.9, 2: 0.8, 1: 0.7}, 8),  # fewer are hardly faster
        ({8: 5.0, 4: 2.0, 2: 1.0, 1: 1.2}, 2),  # a shared one
        ({8: 5.0, 4: 3.0, 2: 2.0, 1: 0.5}, 1),
    ],
)
def test_fewer_threads_are_taken_where_more_are_much_slower(threads, monkeypatch, seconds, expected):
    """D5: two threads beside a busy process took four to five times as long as one."""
    monkeypatch.setattr(distributed, "_seconds_of_convolutions", seconds.__getitem__)
    assert sensible_threads() == expected
    assert threads[-1] == 8


def test_a_number_in_the_environment_is_taken_without_measuring(threads, monkeypatch):
    monkeypatch.setenv("OMP_NUM_THREADS", "8")
    monkeypatch.setattr(distributed, "_seconds_of_convolutions", lambda _: pytest.fail("measured"))
    assert sensible_threads() == 8


def test_convolutions_are_really_timed():
    before = torch.get_num_threads()
    assert 0 < distributed._seconds_of_convolutions(1) < 60
    torch.set_num_threads(before)


def test_a_run_keeps_the_threads_that_it_began_with_and_restores_those_before(tiny_run, monkeypatch, capsys):
    monkeypatch.setattr("vae.training.trainer.sensible_threads", lambda: 2)
    config = without_adversary(replace(tiny_run, updates=2, validate_every=2))
    run = train(config)
    printed = capsys.readouterr()
    assert "On CPU, precision 32-true, 2 threads" in printed.out
    assert "note: threads=2, since the 1 that torch would take are slower here just now" in printed.err
    assert read_json(run / "config.json")["threads"] == 2
    assert torch.get_num_threads() == 1

    # A resumed run does not measure again.
    monkeypatch.setattr("vae.training.trainer.sensible_threads", lambda: pytest.fail("measured"))
    train(replace(config, updates=4, resume=str(run)))
    assert "2 threads" in capsys.readouterr().out


def test_a_number_that_is_asked_for_is_taken(tiny_run, monkeypatch, capsys):
    monkeypatch.setattr("vae.training.trainer.sensible_threads", lambda: pytest.fail("measured"))
    train(without_adversary(replace(tiny_run, updates=2, threads=3)))
    assert "3 threads" in capsys.readouterr().out


def test_a_plan_says_how_far_its_timings_scattered(tiny_run, capsys):
    show.show(plan(without_adversary(tiny_run)))
    assert "their timings scattered by " in " ".join(capsys.readouterr().out.split())
