"""The processes of one job: which one this is, what they decide together, and the workers that one process starts.

`place` reads the rank from the environment. `ProcessGroup` makes the decisions that all processes of a training run
must take alike. `Team` is the same for evaluation: its processes are started by torchrun and talk over gloo, which
needs no GPU. `spread` runs jobs in forked workers of one process.
"""

import os
import signal
import statistics
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from datetime import timedelta
from multiprocessing import get_context
from multiprocessing.connection import Connection, wait
from multiprocessing.context import ForkProcess
from typing import Any, NamedTuple, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor

from vae.errors import InputError, require

WORLDS = (("RANK", "WORLD_SIZE"), ("SLURM_PROCID", "SLURM_NTASKS"))
MUCH_SLOWER = 1.5  # times; below it more threads are kept
TIMINGS = 9
MOST_WORKERS = 4  # per process, unless data.workers asks for another number


class Place(NamedTuple):
    """Rank of this process, number of processes (`world`), and the environment variable that gave the number."""

    rank: int = 0
    world: int = 1
    said_by: str = ""


def place() -> Place:
    """Read rank and number of processes from the variables of torchrun or SLURM. Without them: rank 0 of 1.

    The processes need not know each other. Raises InputError unless both are numbers and the rank is the smaller one.
    """
    for ranks, worlds in WORLDS:
        rank, world = os.environ.get(ranks), os.environ.get(worlds)
        if rank is not None and world is not None:
            numbers = rank.isdecimal() and world.isdecimal() and int(rank) < int(world)
            require(numbers, f"{ranks}={rank}, {worlds}={world} in the environment", "a number below the other")
            return Place(int(rank), int(world), worlds)
    return Place()


def workers_for(wanted: int | None) -> int:
    """Return `wanted`, or, where it is None, the number of cores but at most `MOST_WORKERS`."""
    return min(MOST_WORKERS, cores()) if wanted is None else wanted


def sensible_threads() -> int:
    """Return how many threads convolutions on this CPU should have: torch's number, unless fewer are clearly faster.

    Where other programs use the cores too, threads wait for each other, and more of them can take several times as
    long. So convolutions are timed with all of them, with a half, a quarter and so on, which takes about a second.
    OMP_NUM_THREADS in the environment is taken as it is.
    """
    import torch

    most = torch.get_num_threads()
    if most == 1 or "OMP_NUM_THREADS" in os.environ:
        return most

    numbers = [most >> halvings for halvings in range(most.bit_length())]
    try:
        seconds = {number: _seconds_of_convolutions(number) for number in numbers}
    finally:
        torch.set_num_threads(most)
    fastest = min(seconds, key=lambda number: seconds[number])
    return fastest if seconds[most] > MUCH_SLOWER * seconds[fastest] else most


def _seconds_of_convolutions(threads: int) -> float:
    """Return the median seconds of a convolution such as autoencoders have, with so many threads."""
    import torch
    import torch.nn.functional as F

    torch.set_num_threads(threads)
    images = torch.ones(2, 64, 64, 64)
    weight = torch.ones(64, 64, 3, 3)
    taken = []
    for _ in range(TIMINGS):
        began = time.perf_counter()
        F.conv2d(images, weight, padding=1)
        taken.append(time.perf_counter() - began)
    return statistics.median(taken)


def cores() -> int:
    """Count the cores that this process may use, at least 1.

    Where torchrun started several processes on the machine, each gets an equal share.
    """
    allowed = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    beside = os.environ.get("LOCAL_WORLD_SIZE", "1")
    return max(1, allowed // (int(beside) if beside.isdecimal() else 1))


def outlive_signals(_: int) -> None:
    """Make a data-loading worker ignore the signals that ask its process to stop. The argument is the worker's number.

    A signal to the process group reaches the workers too, but their process may need them to finish an update. They
    ignore SIGINT and SIGUSR1. SIGTERM ends them only after ten minutes, because an update may be slow; usually their
    process ends them earlier.
    """
    for number in (signal.SIGINT, signal.SIGUSR1):
        signal.signal(number, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, lambda *_: signal.alarm(600))


Value = TypeVar("Value")


def world_size() -> int:
    """Count the processes that train together; 1 where there is no process group."""
    return dist.get_world_size() if dist.is_available() and dist.is_initialized() else 1


def mean_over_ranks(tensor: Tensor) -> Tensor:
    """Average `tensor` over all processes, without a gradient, on its own device. One process gets `tensor` itself."""
    if world_size() == 1:
        return tensor
    total = tensor.detach().clone()
    dist.all_reduce(total)
    return total / world_size()


class ProcessGroup:
    """Decisions that all processes of a training run must take alike.

    They are exchanged between CPUs over gloo, so no GPU waits for them.
    """

    def __init__(self) -> None:
        self._group: Any = None

    def init(self, timeout: timedelta) -> None:
        """Create the group. All processes call this at once, after the default process group exists.

        `timeout` is how long a process waits for the others. A run of one process has no group.
        """
        if world_size() > 1:
            self._group = dist.new_group(timeout=timeout, backend="gloo")

    def all_reduce_max(self, value: int) -> int:
        """Return the largest `value` of all processes, or `value` itself where there is no group."""
        if self._group is None:
            return value
        tensor = torch.tensor(value)
        dist.all_reduce(tensor, dist.ReduceOp.MAX, self._group)
        return int(tensor)

    def all_gather(self, mine: Value) -> list[Value]:
        """Return what every process passes as `mine`, in order of rank. It must be picklable."""
        said = [mine] * world_size()
        if self._group is not None:
            dist.all_gather_object(said, mine, self._group)
        return said


TEAM_TIMEOUT = timedelta(days=7)  # one process may have far more to do than another
TORCHRUN = "WORLD_SIZE"
Said = TypeVar("Said")


class Team:
    """This process among those that evaluate together. With one process nothing is sent."""

    def __init__(self, here: Place) -> None:
        self.rank, self.world = here.rank, here.world

    @property
    def leads(self) -> bool:
        """Whether this is the first process."""
        return self.rank == 0

    def of_first(self, value: Said) -> Said:
        """Return the first process's `value` in every process. It must be picklable."""
        said = [value]
        if self.world > 1:
            dist.broadcast_object_list(said)
        return said[0]

    def agree(self, plan: dict[str, Any]) -> None:
        """Raise InputError in every process unless all pass an equal `plan`.

        The error names the first key that differs.
        """
        said = [plan] * self.world
        if self.world > 1:
            dist.all_gather_object(said, plan)
        for other in said:
            if (key := first_difference(other, plan)) is not None:
                raise InputError(f"the processes see different {key}: all must have the same files and versions")

    def wait(self) -> None:
        """Wait until all processes are here."""
        if self.world > 1:
            dist.barrier()

    def device(self, device: torch.device) -> torch.device:
        """Return the device for this process.

        If several processes share a machine and "cuda" has no index, each process gets a GPU of its own, by its local
        rank. Any other device is returned as it is.
        """
        if device.type != "cuda" or device.index is not None or self.world == 1:
            return device
        return torch.device("cuda", int(os.environ.get("LOCAL_RANK", "0")) % torch.cuda.device_count())


def leads_alone() -> bool:
    """Return whether this process was the first of those that trained together, and leave their process group.

    Without a group the environment says which process this is.
    """
    if not (dist.is_available() and dist.is_initialized()):
        return place().rank == 0
    rank = dist.get_rank()
    dist.destroy_process_group()
    return rank == 0


def first_difference(one: dict[str, Any], other: dict[str, Any]) -> str | None:
    """Return the first key under which two plans differ, or None. Nested keys are joined: "library.code"."""
    for key in [*one, *other]:
        a, b = one.get(key), other.get(key)
        if a != b:
            below = first_difference(a, b) if isinstance(a, dict) and isinstance(b, dict) else None
            return key if below is None else f"{key}.{below}"
    return None


@contextmanager
def gathered() -> Iterator[Team]:
    """Yield the team of processes that torchrun started; the process group is destroyed at the end of the block.

    Other launchers, and a single process, get a team of one.
    """
    here = place()
    if here.said_by != TORCHRUN or here.world == 1:
        yield Team(Place())
        return
    dist.init_process_group("gloo", timeout=TEAM_TIMEOUT)
    try:
        yield Team(here)
    finally:
        dist.destroy_process_group()


Advance = Callable[[int], object]
Work = Callable[[int, Advance], object]  # (number of a shard, callback for the number of images done)
LISTEN_SECONDS = 10.0  # for a worker to end by itself before it is killed


def spread(work: Work, shards: Sequence[int], workers: int, advance: Advance) -> None:
    """Call `work(shard, advance)` for every shard, in up to `workers` forked processes. The first failure ends all.

    `advance` is called here with the number of images done. With one worker everything runs in this process. Raises the
    worker's InputError, InputError where a signal ended a worker, and RuntimeError where it failed in another way.
    """
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
            there.close()  # only the worker's copy is left, so the pipe ends when the worker does
        _listen(dict(running), advance)
    finally:
        for process in running.values():
            process.terminate()
        for process in running.values():
            process.join(LISTEN_SECONDS)
            process.kill()
            process.join()


def _work(work: Work, shards: Sequence[int], parent: Connection, started_by: int) -> None:
    """Run `work` on some shards in a forked worker, and send progress or an InputError to `parent`."""
    import torch

    # One thread each: the workers together use the cores.
    torch.set_num_threads(1)
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(1))  # leaving in order deletes the file it was writing

    def advance(images: int) -> None:
        if os.getppid() != started_by:
            sys.exit(1)  # its parent has ended
        parent.send(images)

    try:
        for shard in shards:
            work(shard, advance)
    except InputError as error:
        parent.send(error)
    except KeyboardInterrupt:
        pass  # the signal goes to the whole group, and the parent reports it


def _listen(running: dict[Connection, ForkProcess], advance: Advance) -> None:
    """Pass progress on to `advance` until every worker has ended. Raises where one of them fails."""
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
    """Raise where a worker ended by a signal (InputError) or with an error of its own (RuntimeError)."""
    if exitcode is not None and exitcode < 0:
        wrong = f"a worker was ended by signal {-exitcode}, as happens when memory runs out"
        raise InputError(f"{wrong}; lower --workers: what is finished stays, and the command goes on from there")
    if exitcode:
        raise RuntimeError("a worker failed; what it printed stands above")
