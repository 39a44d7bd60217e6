"""The printed plan: tables and lines on the terminal."""

from rich.console import Console
from rich.table import Table

from vae.console import say
from vae.training.plan.plan import Memory, Plan

GIB, MIB = 2**30, 2**20
SCATTERED = 0.25
BUSY = ", as on a machine with other work: the run may take that much longer"
FLOPS = ((1e15, "PFLOP"), (1e12, "TFLOP"), (1e9, "GFLOP"), (1e6, "MFLOP"))
DURATIONS = ((48 * 3600, 24 * 3600, "days"), (2 * 3600, 3600, "hours"), (120, 60, "minutes"))


def show(plan: Plan) -> None:
    """Print a plan: what is computed, what it takes, and whether it fits."""
    console = Console(markup=False, highlight=False)
    table = Table("network", "parameters", "learn", "for a training image")
    for name, network in plan.networks.items():
        flops = "" if network.flops is None else _flops(network.flops)
        table.add_row(name, f"{network.parameters:,}", f"{network.learning:,}", flops)
    console.print(table)

    table = Table("updates", "number", "one of them", "time of one")
    for phase in plan.phases:
        seconds = "" if phase.seconds is None else _duration(phase.seconds)
        table.add_row(phase.name, f"{phase.updates:,}", _flops(phase.flops), seconds)
    console.print(table)

    table = Table("memory of a process at its peak", "")
    for name, size in plan.memory.parts.items():
        table.add_row(name, _bytes(size))
    table.add_row("together", _bytes(sum(plan.memory.parts.values())))
    console.print(table)

    lines = {
        "device": plan.device if plan.processes == 1 else f"{plan.processes} processes, each on {plan.device}",
        "images": _images(plan),
        "exchange": f"{_bytes(plan.reduced)} of gradients from each process an update" if plan.reduced else "",
        "time": _time(plan),
        "disk": f"{_bytes(plan.disk.needed)} at most, checkpoints of {_bytes(plan.disk.checkpoint)} and the best "
        f"export; {_bytes(plan.disk.available)} are free"
        + ("" if plan.disk.needed <= plan.disk.available else ": DOES NOT FIT"),
        "memory": _verdict(plan.memory),
    }

    for label, text in lines.items():
        if text:
            say(f"{label:>10}  {text}")
    for remedy in plan.memory.remedies:
        say(f"{'instead':>10}  {remedy.overrides}: {_bytes(remedy.needed)}, {_fits(remedy.fits)}")
    for note in plan.notes:
        say(f"{'note':>10}  {note}")


def _verdict(memory: Memory) -> str:
    """Say how much memory is needed, and, where the device is here, whether it is there."""
    needed = f"{_bytes(memory.needed)} are needed, a margin of a tenth included"
    if memory.available is None or memory.fits is None:
        return needed
    most = f"data.batch_size={memory.largest_batch} is the most" if memory.largest_batch else "not even one image would"
    return f"{needed}, {_bytes(memory.available)} are there: {_fits(memory.fits).upper()}; {most}"


def _fits(fits: bool) -> str:
    """Say whether it fits."""
    return "fits" if fits else "does not fit"


def _images(plan: Plan) -> str:
    """Say how many images an update and the run have, and how many epochs that makes."""
    epochs = "" if plan.epochs is None else f", {plan.epochs:,.0f} epochs"
    return f"{plan.images_per_update:,} an update, {plan.images_seen:,} in all{epochs}"


def _time(plan: Plan) -> str:
    """Say how long the run will take, and how that was predicted, or why it was not."""
    if plan.pace is None or plan.hours is None:
        is_here = plan.memory.available is not None
        return "not predicted: " + ("not even a small update fits" if is_here else "no such device here")
    pace = plan.pace
    height, width = plan.pace.size
    return (
        f"about {_duration(3600 * plan.hours)}, predicted by the operations from real updates of up to "
        f"{pace.images} x {width} x {height} px, {_flops(1 / pace.per_flop)}/s; "
        f"their timings scattered by {pace.scatter:.0%}{BUSY if pace.scatter > SCATTERED else ''}"
    )


def _duration(seconds: float) -> str:
    """Write seconds in the unit that suits them."""
    for least, unit, name in DURATIONS:
        if seconds >= least:
            return f"{seconds / unit:,.1f} {name}"
    return f"{seconds:.3g} s"


def _flops(number: float) -> str:
    """Write a number of operations in the unit that suits it."""
    unit, name = next((one for one in FLOPS if number >= one[0]), FLOPS[-1])
    return f"{number / unit:.3g} {name}"


def _bytes(number: int) -> str:
    """Write bytes as MiB or GiB."""
    return f"{number / GIB:.2f} GiB" if number >= GIB else f"{number / MIB:.0f} MiB"
