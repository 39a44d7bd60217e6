"""Workers of one process, and what becomes of them."""

import os
import signal
import sys
from collections.abc import Callable, Sequence
from multiprocessing import get_context
from multiprocessing.connection import Connection, wait
from multiprocessing.context import ForkProcess

from vae.errors import InputError

Advance = Callable[[int], object]
Work = Callable[[int, Advance], object]  # (a shard's number, what is told of every image done)
PATIENCE = 10.0  # seconds for a worker to leave in order


def spread(work: Work, shards: Sequence[int], workers: int, advance: Advance) -> None:
    """`work` on every shard, by as many forked workers; the first that fails ends all."""
    workers = min(workers, len(shards))
    if workers <= 1:
        for shard in shards:
            work(shard, advance)
        return
    context = get_context("fork")
    running: dict[Connection, ForkProcess] = {}
    try:
        for number in range(workers):
            here, there = context.Pipe(duplex=False)
            arguments = (work, shards[number::workers], there, os.getpid())
            running[here] = context.Process(target=_work, args=arguments, daemon=True)
            running[here].start()
            there.close()  # so that the worker's end is the only one
        _listen(dict(running), advance)
    finally:
        for process in running.values():
            process.terminate()
        for process in running.values():
            process.join(PATIENCE)
            process.kill()
            process.join()


def _work(work: Work, shards: Sequence[int], parent: Connection, started_by: int) -> None:
    import torch

    torch.set_num_threads(1)
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(1))  # what it was writing vanishes

    def advance(images: int) -> None:
        if os.getppid() != started_by:
            sys.exit(1)  # nobody waits for it
        parent.send(images)

    try:
        for shard in shards:
            work(shard, advance)
    except InputError as error:
        parent.send(error)
    except KeyboardInterrupt:
        pass  # of the whole group: the parent says so


def _listen(running: dict[Connection, ForkProcess], advance: Advance) -> None:
    """Until every worker has ended, or one of them not well."""
    while running:
        for end in wait(list(running)):
            assert isinstance(end, Connection)
            try:
                said = end.recv()
            except EOFError:
                process = running.pop(end)
                process.join()
                _check(process.exitcode)
                continue
            if isinstance(said, InputError):
                raise said
            advance(said)


def _check(exitcode: int | None) -> None:
    if exitcode is not None and exitcode < 0:
        wrong = f"a worker was ended by signal {-exitcode}, as happens when memory runs out"
        raise InputError(f"{wrong}; lower --workers: what is finished stays, and the command goes on from there")
    if exitcode:
        raise RuntimeError("a worker failed; what it printed stands above")
