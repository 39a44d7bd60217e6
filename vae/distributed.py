"""Which of how many processes this is, how many cores it has, and what its workers heed.

What the processes of a run share besides gradients.

The processes that measure together: started by torchrun, over gloo, which needs no GPU.

Workers of one process, and what becomes of them."""

import os
import signal
import sys
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
MOST_WORKERS = 4  # unless data.workers asks for another number


class Place(NamedTuple):
    """Which of how many processes this is, and which variable of the environment says so."""

    rank: int = 0
    world: int = 1
    said_by: str = ""


def place() -> Place:
    """By the environment; processes need not know each other."""
    for ranks, worlds in WORLDS:
        rank, world = os.environ.get(ranks), os.environ.get(worlds)
        if rank is not None and world is not None:
            numbers = rank.isdecimal() and world.isdecimal() and int(rank) < int(world)
            require(numbers, f"{ranks}={rank}, {worlds}={world} in the environment", "a number below the other")
            return Place(int(rank), int(world), worlds)
    return Place()


def workers_for(wanted: int | None) -> int:
    """As many as are wanted, else as there are cores, at most `MOST_WORKERS`."""
    return min(MOST_WORKERS, cores()) if wanted is None else wanted


def cores() -> int:
    """That this process may use, its share where torchrun started several on the machine."""
    allowed = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    beside = os.environ.get("LOCAL_WORLD_SIZE", "1")
    return max(1, allowed // (int(beside) if beside.isdecimal() else 1))


def outlive_signals(_: int) -> None:
    """A signal to the group reaches the workers too, but their process may have an update to finish with them.

    So they ignore all but SIGTERM, and that one for ten minutes: an update may be slow. Theirs ends them when it does.
    """
    for number in (signal.SIGINT, signal.SIGUSR1):
        signal.signal(number, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, lambda *_: signal.alarm(600))


Value = TypeVar("Value")


def world_size() -> int:
    """Processes that train together; 1 where there is no process group."""
    return dist.get_world_size() if dist.is_available() and dist.is_initialized() else 1


def mean_over_ranks(tensor: Tensor) -> Tensor:
    """Without a gradient, on the tensor's device."""
    if world_size() == 1:
        return tensor
    total = tensor.detach().clone()
    dist.all_reduce(total)
    return total / world_size()


class ProcessGroup:
    """Decisions that all processes must take alike. Over the CPU: no GPU waits for them."""

    def __init__(self) -> None:
        self._group: Any = None

    def init(self, timeout: timedelta) -> None:
        """To be called by all processes at once, when they know each other."""
        if world_size() > 1:
            self._group = dist.new_group(timeout=timeout, backend="gloo")

    def all_reduce_max(self, value: int) -> int:
        if self._group is None:
            return value
        tensor = torch.tensor(value)
        dist.all_reduce(tensor, dist.ReduceOp.MAX, self._group)
        return int(tensor)

    def all_gather(self, mine: Value) -> list[Value]:
        said = [mine] * world_size()
        if self._group is not None:
            dist.all_gather_object(said, mine, self._group)
        return said


TEAM_TIMEOUT = timedelta(days=7)  # one process may have far more to do than another
TORCHRUN = "WORLD_SIZE"
Said = TypeVar("Said")


class Team:
    """This process among the others; alone, it talks to nobody."""

    def __init__(self, here: Place) -> None:
        self.rank, self.world = here.rank, here.world

    @property
    def leads(self) -> bool:
        return self.rank == 0

    def of_first(self, value: Said) -> Said:
        """What the first process says."""
        said = [value]
        if self.world > 1:
            dist.broadcast_object_list(said)
        return said[0]

    def agree(self, plan: dict[str, Any]) -> None:
        """Refuse, in every process, to go on with different things."""
        said = [plan] * self.world
        if self.world > 1:
            dist.all_gather_object(said, plan)
        for other in said:
            if (key := first_difference(other, plan)) is not None:
                raise InputError(f"the processes see different {key}: all must have the same files and versions")

    def wait(self) -> None:
        """Until all are here."""
        if self.world > 1:
            dist.barrier()

    def device(self, device: torch.device) -> torch.device:
        """Where there are several GPUs, one of its own for each process of a machine."""
        if device.type != "cuda" or device.index is not None or self.world == 1:
            return device
        return torch.device("cuda", int(os.environ.get("LOCAL_RANK", "0")) % torch.cuda.device_count())


def leads_alone() -> bool:
    """Whether this is the first of the processes that trained together; their group, if there is one, is left."""
    if not (dist.is_available() and dist.is_initialized()):
        return place().rank == 0
    rank = dist.get_rank()
    dist.destroy_process_group()
    return rank == 0


def first_difference(one: dict[str, Any], other: dict[str, Any]) -> str | None:
    """The first key under which two plans differ, with the one below it: "library.code"."""
    for key in [*one, *other]:
        a, b = one.get(key), other.get(key)
        if a != b:
            below = first_difference(a, b) if isinstance(a, dict) and isinstance(b, dict) else None
            return key if below is None else f"{key}.{below}"
    return None


@contextmanager
def gathered() -> Iterator[Team]:
    """The team, which is dissolved at the end."""
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
Work = Callable[[int, Advance], object]  # (a shard's number, what is told of every image done)
LISTEN_SECONDS = 10.0  # seconds for a worker to leave in order


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
            process.join(LISTEN_SECONDS)
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
