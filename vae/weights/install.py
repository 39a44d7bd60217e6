"""Other programs on this machine: how a folder shows which one it is, where it looks for VAEs, and which it can hold.

Each entry of `PROGRAMS` was read in that program's source: AUTOMATIC1111's stable-diffusion-webui 1.10.1 (82a973c, July
2024), Forge (dfdcbab, June 2025), reForge (3b56b26, March 2026), ComfyUI 0.3.64 (a125cd8, October 2025), SD.Next
(058a7f0, July 2026) and Fooocus 2.5.5 (59f183a, January 2025). All of them list `NAME.vae.safetensors` in their own
folder of VAEs, and the folders below it.
"""

import re
from dataclasses import dataclass
from pathlib import Path

import torch

from vae.errors import InputError, require
from vae.run_dir import FILE_ENDING, RunDir
from vae.weights import read_autoencoder, save_found
from vae.weights.describe import clients_of, title_of
from vae.weights.families import FAMILIES, families_of, has_scale_of
from vae.weights.load import PIPELINE_PART
from vae.weights.loaded import LoadedWeights, noting_the_scale, of_family, read_json
from vae.weights.taesd import PAIR_FILE

MODELS = "models"  # the folder of models in every program
EXTRA_PATHS = "extra_model_paths.yaml"  # of ComfyUI; it adds folders to models/vae and takes none away
CHECKPOINTS = "models/Stable-diffusion"
INNER_FOLDERS = (PIPELINE_PART, "diffusers")  # of a pipeline and of an export; their names say nothing
NEVER_IN_A_NAME = re.compile(r"[/\\\x00-\x1f]|^\.|^$")


@dataclass(frozen=True)
class Program:
    """A program that lists the VAEs in a folder."""

    name: str
    marks: tuple[str, ...]  # files and folders in its own folder; the first entry whose marks are all there counts
    folder: str  # of VAEs, below its own folder
    client: str  # the name in `clients_of` of the loader that it has
    families: tuple[str, ...] | None  # of its diffusion models; None if it has all whose VAEs its loader takes
    holds: str  # which VAEs, in words
    menu: str
    refresh: str  # how a program that runs is told to read its folder again
    settings: tuple[tuple[str, str, str], ...] = ()  # (file, key, folder below) that move the folder; the first counts
    by_name: bool = False  # whether "Automatic" takes a VAE for each checkpoint that its name begins with


BESIDE_IT = "press the refresh button beside that menu, or restart it"
PROGRAMS = (
    Program(
        name="Fooocus",
        marks=("fooocus_version.py", "ldm_patched"),
        folder="models/vae",
        client="ComfyUI",  # Fooocus has the loader of an early ComfyUI
        families=("sdxl",),
        holds="VAEs of SDXL only",
        menu="Advanced > Developer Debug Mode > Debug Tools > VAE",
        refresh="press Models > Refresh All Files, or restart it",
        settings=(("config.txt", "path_vae", ""),),
    ),
    Program(
        name="Forge",
        marks=("modules_forge", "backend"),
        folder="models/VAE",
        client="Forge",
        families=None,
        holds="the KL networks of SD 1.x/2.x, SDXL, the x4 upscaler, SD3 and FLUX.1",
        menu="VAE / Text Encoder, at the top of the page",
        refresh="reload the page, or press the refresh button beside Checkpoint",
    ),
    Program(
        name="reForge",  # Forge before August 2024 and Forge Classic have the same folders and menus
        marks=("modules_forge", "ldm_patched"),
        folder="models/VAE",
        client="A1111",
        families=("sd", "sdxl", "sd3"),
        holds="the KL networks of SD 1.x/2.x, SDXL and SD3",
        menu="SD VAE, at the top of the page and in Settings > VAE",
        refresh=BESIDE_IT,
        by_name=True,
    ),
    Program(
        name="SD.Next",
        marks=("installer.py", "modules/sd_vae.py"),
        folder="models/VAE",
        client="SD.Next",
        families=None,
        holds="the KL networks of SD 1.x/2.x, SDXL, SD3 and FLUX.1",
        menu="Settings > Variational Auto Encoder > VAE model",
        refresh=BESIDE_IT,
        settings=(("config.json", "vae_dir", ""), ("config.json", "models_dir", "VAE")),
    ),
    Program(
        name="A1111",
        marks=("webui.py", "modules/sd_vae.py"),
        folder="models/VAE",
        client="A1111",
        families=("sd", "sdxl", "sd3"),
        holds="the KL networks of SD 1.x/2.x, SDXL and SD3",
        menu="Settings > VAE > SD VAE",
        refresh=BESIDE_IT,
        by_name=True,
    ),
    Program(
        name="ComfyUI",  # its desktop version keeps these two folders apart from the code
        marks=("custom_nodes", MODELS),
        folder="models/vae",
        client="ComfyUI",
        families=None,
        holds="KL networks of SD's widths at f8 or f4, and the tiny ones of SD 1.x/2.x, SDXL, SD3 and FLUX.1",
        menu="a Load VAE node",
        refresh="press R in its window",
    ),
)


@dataclass(frozen=True)
class Place:
    """A program and the folder that it is in."""

    program: Program
    root: Path

    @property
    def folder(self) -> Path:
        """Where the program looks for VAEs: the folder that its settings name, if it exists, or the usual one.

        Raises WeightsError where its settings are not readable.
        """
        for file, key, below in self.program.settings:
            settings = self.root / file
            named = read_json(settings).get(key) if settings.is_file() else None
            if isinstance(named, str) and named and (self.root / named).is_dir():
                return self.root / named / below
        return self.root / self.program.folder

    def file(self, name: str) -> Path:
        """Return the file that the program lists for the VAE `name`."""
        return self.folder / f"{name}{FILE_ENDING}"

    def notes(self, name: str) -> list[str]:
        """List what else somebody who puts the VAE `name` there must know, in words."""
        lines = []
        taken = _checkpoints_named(self.root / CHECKPOINTS, name) if self.program.by_name else []
        if taken:
            lines.append(f"while SD VAE is Automatic, it is used with {', '.join(taken)}, as its name begins so")

        extra = self.root / EXTRA_PATHS
        if extra.is_file() and re.search(r"^\s+vae\s*:", extra.read_text(encoding="utf-8", errors="replace"), re.M):
            lines.append(f"{EXTRA_PATHS} names another folder of VAEs; models/vae works all the same")
        return lines


def _checkpoints_named(folder: Path, name: str) -> list[str]:
    """List the checkpoints below `folder`, without suffix, with whose name the file of the VAE `name` begins."""
    files = [file for ending in ("ckpt", "safetensors") for file in folder.rglob(f"*.{ending}")]
    stems = {file.stem for file in files if not file.stem.endswith(".vae")}
    return sorted(stem for stem in stems if f"{name}{FILE_ENDING}".startswith(stem))


def find_program(path: Path) -> Place:
    """Return the program in the folder `path`.

    `path` may also be the program's folder of models or a folder in that, or the folder of a portable package, which
    has the program one level below. Raises InputError where there is no known program, or more than one.
    """
    path = path.expanduser().absolute()
    require(path.is_dir(), f"--webui {path}: no such folder", "the folder of the program")

    models = next((folder for folder in (path, path.parent) if folder.name == MODELS), None)
    around = [path] if models is None else [path, models.parent]
    here = next((place for folder in around if (place := _program_in(folder)) is not None), None)
    if here is not None:
        return here

    below = {mark.parent for program in PROGRAMS for mark in path.glob(f"*/{program.marks[0]}")}
    places = [place for folder in sorted(below) if (place := _program_in(folder)) is not None]
    if len(places) > 1:
        raise InputError(f"--webui {path}: {len(places)} programs in it; name one, as {places[0].root}")
    if not places:
        names = ", ".join(program.name for program in PROGRAMS)
        remedy = f"give the program's own folder, or write the file: vae convert MODEL FOLDER/NAME{FILE_ENDING}"
        raise InputError(f"--webui {path}: none of {names} is in it; {remedy}")
    return places[0]


def _program_in(folder: Path) -> Place | None:
    """Return the program whose marks `folder` has, or None."""
    programs = (program for program in PROGRAMS if all((folder / mark).exists() for mark in program.marks))
    return next((Place(program, folder) for program in programs), None)


def name_of(model: Path) -> str:
    """Return what a VAE is called after its path: the run's name, the folder's name, or that of the file."""
    path = model.expanduser().absolute()
    run = RunDir.owning(path)
    if run is not None:
        return run.path.name
    if path.is_dir():
        return path.parent.name if path.name in INNER_FOLDERS else path.name
    pair = PAIR_FILE.fullmatch(path.name)
    return path.stem.removesuffix(".vae") if pair is None else pair["base"]


def check_name(name: str) -> str:
    """Return `name` without the ending of weights files. Raises InputError where it is no file's name."""
    bare = name.removesuffix(".safetensors").removesuffix(".vae")
    require(not NEVER_IN_A_NAME.search(bare), f"--name {name!r}", "a file's name, without folders")
    return bare


def check_held(found: LoadedWeights, program: Program) -> None:
    """Raise InputError where `program` cannot hold the autoencoder, or has no diffusion model with its latents."""
    families = families_of(found.config)
    possible = [family for family in families if _may_be_of(found, family)] or families
    fits = program.families is None or bool(set(possible) & set(program.families))

    if program.client not in clients_of(found.config) or not fits:
        remedy = _remedy(found, program)
        raise InputError(f"{found.file}: {title_of(found)}, and {program.name} holds {program.holds}; {remedy}")

    if found.config.latents_are_scaled and found.family is None:
        unknown = f"{found.file}: {program.name} must know whose latents it has, which the file does not tell"
        raise InputError(f"{unknown}; --family says it: {' or '.join(families)}")


def _may_be_of(found: LoadedWeights, family: str) -> bool:
    """Return whether what the file states of its latents is true of `family`."""
    if found.config.latents_are_scaled:
        return found.family in (None, family)
    return not found.scale_is_known or has_scale_of(family, found.config)


def _remedy(found: LoadedWeights, program: Program) -> str:
    """Say what to do with an autoencoder that `program` cannot hold."""
    config = found.config
    if config.mid_block_pool:
        pair = "models/vae_approx/taef2_decoder.safetensors"
        return f"vae convert {found.file} {pair} writes the pair that newer versions of ComfyUI list as taef2"

    fitting = [family for family in families_of(config) if family in (program.families or FAMILIES)]
    told = [family for family in fitting if program.client in clients_of(of_family(config, family))]
    if told:
        return f"if it is one of these, --family {' or '.join(told)} says so"
    clients = clients_of(config)
    return f"use it in {' or '.join(clients)}" if clients else "no other program can load it"


def put(found: LoadedWeights, file: Path, dtype: torch.dtype | None, *, replace: bool) -> bool:
    """Write the autoencoder to `file` as one file, and return True, or return False where it is there already.

    `dtype` is the precision to write, or None for the stored one. Raises InputError where `file` has another content,
    unless `replace` is set, and WeightsError where it cannot be written. The old file is then as it was.
    """
    cast = found.cast(file, dtype)
    if file.exists():
        if _holds(file, cast):
            return False
        require(replace, f"{file}: there, with another content", "--replace, or another name with --name")
    save_found(cast, file)
    return True


def _holds(file: Path, found: LoadedWeights) -> bool:
    """Return whether `file` is what would be written: the same tensors, configuration and notes, and nothing else."""
    try:
        there = read_autoencoder(file)
    except InputError:
        return False

    config = found.config
    notes = noting_the_scale(found.notes, config)
    if (there.layout, there.config, there.notes, there.others) != (config.file_format, config, notes, 0):
        return False
    if config.latents_are_scaled and there.family != found.family:
        return False
    return there.state.keys() == found.state.keys() and all(
        tensor.dtype == found.state[name].dtype and torch.equal(tensor, found.state[name])
        for name, tensor in there.state.items()
    )
