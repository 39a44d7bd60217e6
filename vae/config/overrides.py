"""The words of a command line, made ready for Hydra: paths and texts of any kind, and keys by other names.

Hydra reads values by a grammar of its own: braces, commas, quotes, brackets and `~` mean something in it. Whoever types
a path or a sentence means none of that. So the value of a key that takes text is quoted here as a whole, `~` at the
start of a path becomes the home directory, and `1e3` is an integer where one is expected.

A key that vae does not have, and other trainers do, is answered with ours.
"""

import os
import re
from collections.abc import Sequence
from dataclasses import Field
from typing import Any

from vae.config.fields import walk
from vae.errors import InputError

AUTO_BATCH = "data.batch_size=auto"
RENAMED = {"allow_left_out": "allow_skipped"}  # keys of earlier versions, which still work
OF_OTHERS = {  # keys of Lightning, diffusers' script, LDM and kohya: ours
    "trainer.max_steps": "updates",
    "trainer.max_epochs": "updates",
    "max_steps": "updates",
    "max_epochs": "updates",
    "max_train_steps": "updates",
    "max_train_epochs": "updates",
    "num_train_epochs": "updates",
    "num_epochs": "updates",
    "epochs": "updates",
    "steps": "updates",
    "trainer.max_time": "max_minutes",
    "trainer.gpus": "trainer.devices",
    "gpus": "trainer.devices",
    "devices": "trainer.devices",
    "num_processes": "trainer.devices",
    "precision": "trainer.precision",
    "mixed_precision": "trainer.precision",
    "trainer.val_check_interval": "validate_every",
    "trainer.check_val_every_n_epoch": "validate_every",
    "validation_steps": "validate_every",
    "checkpointing_steps": "checkpoint_minutes",
    "save_every_n_steps": "checkpoint_minutes",
    "gradient_accumulation_steps": "trainer.accumulate_grad_batches",
    "trainer.gradient_clip_val": "optim.gradient_clip",
    "max_grad_norm": "optim.gradient_clip",
    "learning_rate": "optim.learning_rate",
    "lr": "optim.learning_rate",
    "optim.lr": "optim.learning_rate",
    "base_learning_rate": "optim.learning_rate",
    "model.base_learning_rate": "optim.learning_rate",
    "disc_learning_rate": "optim.discriminator_learning_rate",
    "lr_scheduler": "optim.schedule",
    "lr_warmup_steps": "optim.warmup_updates",
    "weight_decay": "optim.weight_decay",
    "use_ema": "optim.ema_decay",
    "ema_decay": "optim.ema_decay",
    "optimizer": "optim.name",
    "optimizer_type": "optim.name",
    "batch_size": "data.batch_size",
    "train_batch_size": "data.batch_size",
    "data.params.batch_size": "data.batch_size",
    "resolution": "data.resolution",
    "image_size": "data.resolution",
    "data.image_size": "data.resolution",
    "num_workers": "data.workers",
    "data.num_workers": "data.workers",
    "dataloader_num_workers": "data.workers",
    "train_data_dir": "data.root",
    "data_dir": "data.root",
    "dataset": "data.root",
    "dataset_name": "data.root",
    "random_flip": "data.flip",
    "kl_weight": "loss.weights.kl",
    "kl_scale": "loss.weights.kl",
    "perceptual_weight": "loss.weights.perceptual",
    "lpips_scale": "loss.weights.perceptual",
    "pixelloss_weight": "loss.weights.pixel",
    "disc_weight": "loss.weights.adversarial",
    "disc_start": "loss.discriminator_start",
    "disc_loss": "loss.adversarial",
    "rec_loss": "loss.pixel",
    "embed_dim": "model.latent_channels",
    "z_channels": "model.latent_channels",
    "output_dir": "output",
    "logdir": "output",
    "output_name": "name",
    "pretrained_model_name_or_path": "init",
    "pretrained_vae_model_name_or_path": "init",
    "vae": "init",
    "ckpt_path": "init",
    "resume_from_checkpoint": "resume",
    "report_to": "logger",
    "tracker_project_name": "wandb.project",
    "wandb_project": "wandb.project",
    "log_with": "logger",
}
HYDRAS = re.compile(r"-[hmcpr]|-c[pnd]|--(help|multirun|run|cfg|package|resolve|info|config-|shell|hydra)")


def prepared(words: Sequence[str], config: Any) -> list[str]:
    """Return the overrides among `words` as Hydra is to read them. `config` has every key, with its type.

    Raises InputError for a key of another trainer, and for a setting that is written with dashes.
    """
    known = {key: one for key, one, _ in walk(config)}
    return [_prepared(word, known) for word in words]


def _prepared(word: str, known: dict[str, Field[Any]]) -> str:
    """Return one override as Hydra is to read it."""
    given, equals, value = word.partition("=")
    if word == AUTO_BATCH and "auto_batch_size" in known:
        return "auto_batch_size=true"
    if word.startswith("-") and not HYDRAS.match(word):
        raise InputError(f"{word}: settings have no dashes; write {_ours(given.lstrip('-'))}={value or 'VALUE'}")

    if not re.fullmatch(r"[-+~\w.@:/]+", given) or not (equals or word.startswith(("-", "~"))):
        raise InputError(f"{word!r}: not a setting; write KEY=VALUE, as updates=1000")

    mark = given[: len(given) - len(given.lstrip("+~"))]
    key = RENAMED.get(given[len(mark) :], given[len(mark) :])
    if not equals or mark.startswith("~"):
        return word
    if key not in known and key in OF_OTHERS:
        raise InputError(f"{key}: not a key of vae; write {OF_OTHERS[key]}={value or 'VALUE'}{_meaning(key)}")

    owners = [name for name in known if name.endswith(f".{key}")]
    if key not in known and len(owners) == 1:
        raise InputError(f"{key}: not a key by itself; write {owners[0]}={value or 'VALUE'}")

    one = known.get(key)
    return f"{mark}{key}={value if one is None else _value(value, one)}"


def _ours(key: str) -> str:
    """Return our name of a key that was written as an option of another program."""
    key = key.replace("-", "_")
    return OF_OTHERS.get(key, key)


def _meaning(key: str) -> str:
    """Say what to do about a key that counts otherwise than ours."""
    if "epoch" in key:
        return "; one epoch is the number of images divided by the images of an update"
    if OF_OTHERS[key] == "checkpoint_minutes":
        return "; a checkpoint is also written at each validation"
    return ""


def _value(value: str, one: Field[Any]) -> str:
    """Return the value of a known key as Hydra is to read it."""
    kind = one.type.__name__ if isinstance(one.type, type) else str(one.type)
    is_path = bool(one.metadata.get("is_path"))
    if kind in ("int", "int | None"):
        return _integer(value)

    is_list = value.startswith("[") and value.endswith("]")
    if value in ("", "null") or "${" in value:
        return value
    if is_list and (kind == "list[str]" or (kind == "Any" and is_path)):
        return f"[{','.join(_quoted(item, is_path=is_path) for item in _items(value[1:-1]))}]"
    if kind in ("str", "str | None") or (kind == "Any" and is_path):
        return _quoted(value, is_path=is_path)
    return value


def _integer(value: str) -> str:
    """Return a whole number in another spelling, as 1e3 or 1_000, in digits; anything else as it is."""
    try:
        number = float(value)
    except ValueError:
        return value
    return str(int(number)) if number.is_integer() else value


def _quoted(text: str, *, is_path: bool) -> str:
    """Quote a text. One that the user has quoted for Hydra is kept."""
    if re.fullmatch(r"""(['"])(?:\\.|(?!\1).)*\1""", text.strip(), re.DOTALL):
        return text.strip()
    if is_path:
        text = os.path.expanduser(text)  # noqa: PTH111 - a pattern or a URL is no Path

    # In quotes a backslash means itself, except before a quote.
    escaped = re.sub(r"(\\*)('|$)", lambda found: found[1] * 2 + found[2].replace("'", "\\'"), text)
    return f"'{escaped}'"


def _items(text: str) -> list[str]:
    """Split a list at its commas, except at those within quotes. Blanks around an item are removed."""
    parts = re.findall(r"""(?:'(?:\\.|[^'])*'|"(?:\\.|[^"])*"|[^,])+""", text)
    return [part.strip() for part in parts if part.strip()]
