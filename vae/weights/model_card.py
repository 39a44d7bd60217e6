"""The model card of an export: `README.md` as the Hugging Face hub reads it, with what is known and nothing else.

What is known of the training stands in the metadata of the weights. The file may be a stranger's, so every value is
read by its type, and its words are escaped for Markdown.
"""

import json
import math
import re
import sys
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from vae.config.model import AutoencoderConfig
from vae.run_dir import FILE_ENDING
from vae.weights.describe import FAMILY_NAMES, clients_of, warnings_about
from vae.weights.families import families_of
from vae.weights.loaded import ASSUMED, ASSUMED_GROUPS, Notes

LONGEST = 1_000  # characters of a value that are shown
ESCAPED = str.maketrans({"<": "&lt;", "&": "&amp;", "`": "'"} | {mark: f"\\{mark}" for mark in "\\|[]!*~#"})
EMPHASIS = re.compile(r"(?<![^\W_])_|_(?![^\W_])")  # inside a word an underscore is no emphasis, and names stay legible


class Facts:
    """Values of a JSON object by type. What is absent or of another type is empty."""

    def __init__(self, values: object) -> None:
        self._values: Mapping[str, Any] = values if isinstance(values, dict) else {}

    def of(self, name: str) -> "Facts":
        """Return the facts in the object `name`."""
        return Facts(self._values.get(name))

    def text(self, name: str) -> str:
        """Return a value in words, safe in Markdown; "" where it is absent."""
        return words_of(self._values[name]) if name in self._values else ""

    def number(self, name: str) -> float | None:
        """Return a finite number, or None.

        An integer beyond a float's range is None too, because it could not be written as one.
        """
        value = self._values.get(name)
        if type(value) is int:
            return value if abs(value) <= sys.float_info.max else None
        return value if isinstance(value, float) and math.isfinite(value) else None

    def code(self, name: str) -> str:
        """Return a string to stand between backticks, where only backticks have to be replaced; "" where it is none."""
        value = self._values.get(name)
        return " ".join(value.split())[:LONGEST].replace("`", "'") if isinstance(value, str) else ""

    def matching(self, name: str, pattern: re.Pattern[str]) -> str | None:
        """Return a string that `pattern` matches whole, or None."""
        value = self._values.get(name)
        return value if isinstance(value, str) and pattern.fullmatch(value) else None

    def items(self) -> Iterator[tuple[str, str]]:
        """Yield (name, value) in words, without values that are empty; False is kept."""
        return ((words_of(name), self.text(name)) for name, value in self._values.items() if value or value is False)


def words_of(value: object, depth: int = 3) -> str:
    """Return a value as one line that Markdown and HTML take for plain words, of about `LONGEST` characters at most.

    So no file brings an image, a link under another name or a tag into a card. What the user says `about` a run becomes
    plain words as well: it is read back from files, where it cannot be told from a stranger's text. A bare address
    stays an address. Nested lists and objects deeper than `depth` become "...".
    """
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, float):
        return f"{value:.6g}"
    if isinstance(value, list):
        return ", ".join(words_of(each, depth - 1) for each in value)[:LONGEST] if depth else "..."
    if isinstance(value, dict):
        pairs = (f"{words_of(key)} {words_of(each, depth - 1)}" for key, each in value.items())
        return ", ".join(pairs)[:LONGEST] if depth else "..."
    text = " ".join(str(value).split())[:LONGEST]
    return EMPHASIS.sub(r"\\_", text.translate(ESCAPED))


CARD_FILE = "README.md"
MARK = "<!-- Written by vae with the weights, and again with others. Without this line it is yours and stays. -->"
LICENSE = re.compile(r"[a-z0-9][a-z0-9.+-]{0,63}")  # an identifier from the hub's list: apache-2.0, openrail++, other
HUB_NAME = re.compile(r"[A-Za-z0-9][\w.-]{0,95}(/[A-Za-z0-9][\w.-]{0,95})?", re.ASCII)
FILE_NAME = re.compile(r"[\w.+-]{1,120}")
FOLDERS = {"A1111": "models/VAE", "Forge": "models/VAE", "SD.Next": "models/VAE", "ComfyUI": "models/vae"}
OF_THE_RUN = ("precision_in_training", "latent_channels", "fp16_safe", "seed", "vae", "torch")
UNITS = {"psnr": " dB"}


def may_be_written(path: Path) -> bool:
    """Return whether there is no card at `path` yet, or one of ours. A card of somebody else is never replaced."""
    return not path.exists() or (path.is_file() and MARK.encode() in path.read_bytes())


def model_card(config: AutoencoderConfig, notes: Notes, parameters: int, family: str | None = None) -> str:
    """Return the card of an autoencoder with this number of `parameters`: Markdown with YAML in front.

    `family` is the one whose latents a tiny autoencoder has, where the weights tell it.
    """
    known = Facts(notes.training)
    families = families_of(config) if config.latents_are_scaled and family is None else []
    sections = {
        "Data": _data(known),
        "Training": _training(known),
        "Validation": _validation(known),
        "Latents and float16": _latents(config, notes, known),
        "How to load it": _loading(config, known, families),
        "Known limits": _limits(config, notes, families),
        "Licence": [_licence(known)],
    }

    lines = [*_front(config, known), MARK, "", f"# {known.text('name') or 'An autoencoder'}", ""]
    lines += [_what(config, parameters), "", *([known.text("about"), ""] if known.text("about") else [])]
    for title, content in sections.items():
        lines += [f"## {title}", "", *content, ""]
    return "\n".join(lines).rstrip() + "\n"


def _front(config: AutoencoderConfig, known: Facts) -> list[str]:
    """Return the YAML header for the hub. JSON strings are valid YAML strings, whatever they contain."""
    license = known.matching("license", LICENSE)
    base = known.of("base").matching("hub_name", HUB_NAME)
    dataset = known.of("data").matching("hub_name", HUB_NAME)

    return [
        "---",
        *(["library_name: diffusers"] if _is_theirs(config) else []),
        *([f"license: {json.dumps(license)}"] if license else []),
        *([f"base_model: {json.dumps(base)}"] if base else []),
        *(["datasets:", f"- {json.dumps(dataset)}"] if dataset else []),
        "tags:",
        "- vae",
        "- autoencoder",
        "---",
        "",
    ]


def _is_theirs(config: AutoencoderConfig) -> bool:
    """Return whether diffusers can load the network from a folder; otherwise there is a single file."""
    return "diffusers" in clients_of(config)


def _what(config: AutoencoderConfig, parameters: int) -> str:
    """Describe the network in one sentence."""
    factor = config.downsample_factor
    kind = config.kind.network
    name = f"f{factor}c{config.latent_channels}"
    latents = f"latents of {config.latent_channels} channels, {factor} times smaller each way"
    widths = " / ".join(map(str, config.block_out_channels))
    return (
        f"An image autoencoder, `{kind}` {name}: images of {config.in_channels} channels in [-1, 1] to {latents}, and "
        f"back. {parameters:,} parameters, widths {widths}, layers per block {config.layers_per_block}."
    )


def _data(known: Facts) -> list[str]:
    """List the facts about the training data."""
    data = known.of("data")
    lines = [f"- {name.replace('_', ' ')}: {words}" for name, words in data.items()]
    if known.number("resolution"):
        lines.append(f"- resolution: {known.text('resolution')} px")
    return lines or ["Not stated."]


def _training(known: Facts) -> list[str]:
    """List the facts about the training: updates, weights, loss and optimiser."""
    updates, images = known.number("updates"), known.number("images_per_update")
    if updates is None:
        return ["Not stated."]

    loss = known.of("loss")
    lines = [
        f"- {updates:,} updates"
        + (f" of {images:,} images ({known.text('batch_size_per_process')} a process and batch)" if images else ""),
        f"- published weights: {'averaged (EMA)' if known.text('weights') == 'EMA' else known.text('weights')}",
        *(f"- {name}: {known.text(name)}" for name in ("frozen", "trained") if known.text(name)),
        *(
            f"- {words} {_files(start)}"
            for words, start in {"begun from": known.of("base"), "taught by": known.of("teacher")}.items()
            if start.code("file")
        ),
        "",
        "| loss term | weight |",
        "|---|---|",
        *(f"| {name} | {weight} |" for name, weight in loss.of("weights").items()),
        "",
        "| | |",
        "|---|---|",
        *(f"| loss.{name} | {words} |" for name, words in loss.items() if name != "weights"),
        *(f"| optim.{name} | {words} |" for name, words in known.of("optim").items()),
        *(f"| {name} | {known.text(name)} |" for name in OF_THE_RUN),
    ]

    # A row without a value is omitted.
    return [line for line in lines if not line.endswith("|  |")]


def _files(start: Facts) -> str:
    """Name the file of weights, or both files of a pair, with their checksums."""
    pair = (file for file in (start, start.of("other_half")) if file.code("file"))
    return " and ".join(f"`{file.code('file')}`, SHA-256 `{file.code('sha256') or 'not known'}`" for file in pair)


def _validation(known: Facts) -> list[str]:
    """Tabulate the metrics of the validation, with their protocol."""
    validation = known.of("validation")
    metrics = validation.of("metrics")
    rows = [
        f"| {words_of(name)} | {value:.4f}{UNITS.get(name, '')} |"
        for name, _ in metrics.items()
        if (value := metrics.number(name)) is not None
    ]

    if not rows:
        return ["Not stated."]
    return [f"Protocol {validation.text('protocol')}.", "", "| metric | mean |", "|---|---|", *rows]


def _latents(config: AutoencoderConfig, notes: Notes, known: Facts) -> list[str]:
    """List the facts about the latents: scale, spread, and whether float16 is safe."""
    latents = Facts(notes.latents)
    std, active = latents.number("std"), latents.number("active_channels")
    shift = "none" if config.shift_factor is None else f"{config.shift_factor:.6g}"
    lines = [f"- scaling factor {config.scaling_factor:.6g}, shift {shift}: {_whence(config, latents, known)}"]

    if std is not None:
        used = "" if active is None else f"; {active:g} of {config.latent_channels} channels are in use"
        lines.append(f"- standard deviation of the latents {std:.6g}{used}")
    return [*lines, f"- {known.text('precision') or 'safe in float16: not measured'}"]


def _whence(config: AutoencoderConfig, latents: Facts, known: Facts) -> str:
    """Say where the scale comes from: measured, assumed, kept, per channel or configured."""
    if config.latents_std is not None:
        return "`latents_mean` and `latents_std` in `config.json` stand for them, channel by channel"
    if latents.number("scaling_factor") == config.scaling_factor:
        values = latents.text("values_per_channel")
        return f"measured, 1 / standard deviation{f' of {values} values in each channel' if values else ''}"
    if any(latents.text(name) for name in ASSUMED):
        return "assumed, since the file they came from does not tell its family"
    return "kept from the weights it was begun from" if known.of("base").text("file") else "as its configuration says"


def _loading(config: AutoencoderConfig, known: Facts, families: list[str]) -> list[str]:
    """Show how to load the weights in Python, and into which folder of which program they go.

    `families` are those whose latents a tiny autoencoder may have, where nothing tells which: one file has to say it.
    """
    asked = f" --family {' or '.join(families)}" if families else ""
    file = f"{known.matching('name', FILE_NAME) or 'NAME'}{FILE_ENDING}"
    programs = {client: client.partition(" (")[0] for client in clients_of(config)}
    there = ", ".join(f"`{FOLDERS[name]}` of {client}" for client, name in programs.items() if name in FOLDERS)

    if _is_theirs(config):
        library, kind = "diffusers", config.kind.network
        call = f'{kind}.from_pretrained("THIS_FOLDER")  # or its name on the hub'
        single = f"As one file, `{file}` (`vae convert THIS_FOLDER {file}{asked}`), it goes to {there}."
    else:
        library = "vae"
        kind = "load_autoencoder"
        call = f'load_autoencoder("{file}")'
        single = f"The file goes to {there}."

    return [
        "```python",
        f"from {library} import {kind}",
        "",
        f"vae = {call}",
        "```",
        "",
        single if there else "No web UI has a place for such a network.",
    ]


def _limits(config: AutoencoderConfig, notes: Notes, families: list[str]) -> list[str]:
    """List the known limits of the network."""
    lines = [f"- {line}." for line in warnings_about(config)]
    if families:
        whose = " or ".join(FAMILY_NAMES[family] for family in families)
        lines.append(f"- Nothing tells whether its latents are those of {whose}: ComfyUI has to be told by `--family`.")
    if any(Facts(notes.architecture).text(name) for name in ASSUMED_GROUPS):
        lines.append(f"- Its norms have {config.norm_num_groups} groups, which is assumed: nothing told their number.")
    return lines or ["None that the file tells of."]


def _licence(known: Facts) -> str:
    """Name the licence, or say that none is stated."""
    license = known.matching("license", LICENSE)
    return f"`{license}`" if license else "Not stated. Ask whoever trained it before you use it for more than a look."
