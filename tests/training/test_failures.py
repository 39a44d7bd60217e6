"""What libraries raise when a process is gone, in words."""

import pytest

from vae.training import interruption

GLOO = (
    "[/__w/pytorch/pytorch/third_party/gloo/gloo/transport/tcp/unbound_buffer.cc:78] Timed out waiting 15000ms for "
    "recv operation to complete"
)
NCCL = "NCCL communicator was aborted on rank 1."


@pytest.mark.parametrize("raised", [GLOO, NCCL, "Connection reset by peer", "[x/y.cc:1] Broken pipe"])
def test_what_is_raised_when_a_process_is_gone_is_told_as_that(monkeypatch, raised):
    monkeypatch.setattr("vae.distributed.world_size", lambda: 2)
    monkeypatch.setattr("torch.distributed.get_rank", lambda: 0)
    told = interruption._in_words(RuntimeError(raised), 0.25)
    assert told is not None
    assert told.startswith("process 0 of 2 lost another: it died, or was not heard of for 0.25 minutes")
    assert ".cc" not in told


def test_other_errors_are_left_as_they_are(monkeypatch):
    monkeypatch.setattr("vae.distributed.world_size", lambda: 2)
    assert interruption._in_words(RuntimeError("shapes do not match"), 0.25) is None
    assert interruption._in_words(ValueError(GLOO), 0.25) is None
