"""What is typed on a command line means what it says: paths, texts, numbers, groups, and the keys of other trainers."""

import os
from dataclasses import Field
from itertools import zip_longest
from pathlib import Path
from typing import Any

import pytest

from vae.config.compose import compose, run
from vae.config.fields import walk
from vae.config.overrides import OF_OTHERS, prepared
from vae.config.reference import CONFIGS, example_of, groups
from vae.config.schema import EvaluateConfig, TrainConfig
from vae.errors import InputError

TEXTS = [  # none of them begins or ends with a blank, since a shell's user quotes those
    "vae (1).safetensors",
    "Cats, dogs (2024)",
    "It's mine",
    'a "quoted" word',
    "both ' and \"",
    "'a' and 'b'",
    '"a" and "b"',
    "k=v",
    "a=b=c",
    "a,b",
    "[a]",
    "[a].safetensors",
    "{a}",
    "{000000..000099}.tar",
    "a{b,c}d",
    "a:b",
    "a: b",
    "a;b",
    "a&b",
    "a|b",
    "a*b?",
    "a#b",
    "# first",
    "@home",
    "+plus",
    "~inside~",
    "50% off!",
    "$HOME",
    "$(date)",
    "a\\b",
    "ends with \\",
    "back\\'slash",
    "C:\\photos\\new",
    "two  blanks",
    "tab\there",
    "line\nbreak",
    "naïve 漢字 🙂",
    "1e5",
    "007",
    "true",
    "None",
    "-dash",
    "--two",
    "(parenthesis",
    "[bracket",
    "{brace",
    "'quote",
    '"quote',
]


def keys_of(config: Any, *kinds: str) -> dict[str, Field[Any]]:
    """The keys of these types, as they are written in the dataclasses."""
    names = {key: one for key, one, _ in walk(config)}
    written = {key: one.type.__name__ if isinstance(one.type, type) else str(one.type) for key, one in names.items()}
    return {key: one for key, one in names.items() if written[key] in kinds}


def value_of(cfg: Any, key: str) -> Any:
    for part in key.split("."):
        cfg = cfg[part]
    return cfg


def composed(schema: str, *words: str) -> Any:
    """What Hydra makes of the words, before our own checks of values."""
    import hydra
    from hydra.core.config_store import ConfigStore

    kind, folder = {"train": (TrainConfig, CONFIGS), "evaluate": (EvaluateConfig, CONFIGS / "evaluate")}[schema]
    ConfigStore.instance().store(name=f"{schema}_schema", node=kind)
    with hydra.initialize_config_dir(str(folder), version_base="1.3"):
        return hydra.compose(schema, prepared(words, example_of(kind)))


TEXT_KEYS = [
    *(("train", key) for key in keys_of(TrainConfig(), "str", "str | None")),
    *(("evaluate", key) for key in keys_of(EvaluateConfig(model="m"), "str", "str | None")),
    ("evaluate", "model"),
]


@pytest.mark.parametrize("command", ["train", "evaluate"])
def test_every_text_and_path_arrives_in_every_key_as_it_was_typed(command):
    """As Hydra reads one word; the next test composes whole command lines."""
    from hydra.core.override_parser.overrides_parser import OverridesParser

    parser = OverridesParser.create()
    example = TrainConfig() if command == "train" else EvaluateConfig(model="m")
    for key in (key for one, key in TEXT_KEYS if one == command):
        for text in TEXTS:
            if key == "model" and text == "[a]":
                continue  # of an evaluation it may be a list
            read = parser.parse_override(prepared([f"{key}={text}"], example)[0])
            assert (read.key_or_group, read.value()) == (key, text)


@pytest.mark.parametrize("command", ["train", "evaluate"])
def test_every_text_and_path_arrives_through_a_whole_command_line(command):
    """Several at a time: each key takes another text."""
    keys = [key for one, key in TEXT_KEYS if one == command]
    for first in range(0, len(TEXTS), len(keys)):
        given = dict(zip(keys, TEXTS[first : first + len(keys)], strict=False))
        if given.get("model") == "[a]":
            del given["model"]  # of an evaluation it may be a list
        cfg = composed(command, *(f"{name}={text}" for name, text in given.items()))
        assert {name: value_of(cfg, name) for name in given} == given


@pytest.mark.parametrize("key", ["model", "datasets"])
def test_a_list_of_paths_may_have_any_of_them_in_quotes(key):
    cfg = composed("evaluate", f"{key}=[my runs/first, 'a,b', \"it's\", ~/x (1).safetensors, [2] a]")
    assert list(value_of(cfg, key)) == ["my runs/first", "a,b", "it's", str(Path.home() / "x (1).safetensors"), "[2] a"]


def test_the_home_directory_is_meant_in_every_key_that_takes_a_path():
    paths = {key for key, one, _ in walk(TrainConfig()) if one.metadata.get("is_path")}
    assert {"init", "teacher", "resume", "output", "data.root", "data.validation_root", "data.latents"} <= paths
    cfg = composed("train", *(f"{key}=~/my photos" for key in paths))
    assert {value_of(cfg, key) for key in paths} == {os.path.expanduser("~/my photos")}  # noqa: PTH111


def test_no_value_and_values_of_hydra_are_still_there():
    assert composed("train", "init=null").init is None
    assert composed("train", "about=").about == ""
    assert composed("train", "about='quoted for Hydra'").about == "quoted for Hydra"
    assert composed("train", "about=${seed}").about == "0"


@pytest.mark.parametrize(("typed", "number"), [("1e3", 1000), ("1_000", 1000), ("1000.0", 1000), ("12", 12)])
def test_a_whole_number_may_be_spelled_in_any_way(typed, number):
    assert composed("train", f"updates={typed}").updates == number


@pytest.mark.parametrize("key", OF_OTHERS)
def test_a_key_of_another_trainer_is_answered_with_ours(key):
    ours = OF_OTHERS[key]
    assert ours.startswith("trainer.") or ours in {name for name, _, _ in walk(TrainConfig())}
    with pytest.raises(InputError, match=f"^{key}: not a key of vae; write {ours}=7"):
        compose("experiment=quickstart", f"{key}=7")


def test_a_key_without_its_group_and_a_setting_with_dashes_are_answered():
    with pytest.raises(InputError, match=r"crop_scale: not a key by itself; write data\.crop_scale=\[1,1\]"):
        compose("crop_scale=[1,1]")
    with pytest.raises(InputError, match=r"--max-train-steps=5: settings have no dashes; write updates=5"):
        compose("--max-train-steps=5")
    with pytest.raises(InputError, match="'updates': not a setting; write KEY=VALUE"):
        compose("updates")


WORDS_OF_HYDRA = ("hydra.cc", "LexerNo", "mismatched input", "EOF", "struct", "viable alternative", "Override")


@pytest.mark.parametrize(
    "word",
    ["x", "=3", "a b=1", "optim.betas=(0.9,0.99)", "optim.betas=[0.5", "trainer.foo=1", "about=null", "updates=x"],
)
def test_nobody_sees_the_words_of_hydras_grammar(word):
    with pytest.raises(InputError) as refused:
        compose("experiment=quickstart", word)
    assert not any(words in str(refused.value) for words in WORDS_OF_HYDRA)


def test_a_key_of_an_earlier_version_still_works(monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    seen: list[EvaluateConfig] = []
    words = ["evaluate", "model=runs/first", "allow_left_out=true"]
    monkeypatch.setattr("sys.argv", words)
    run("evaluate", seen.append, words)
    assert seen[0].allow_skipped


# ---------------------------------------------------------------------------------------- groups beside an experiment


GROUPS = {name: choices for name, choices in groups("train").items() if name != "experiment"}
EXPERIMENTS = groups("train")["experiment"]


def values_of(group: str, choice: str) -> dict[str, Any]:
    """The values that a group's file states, with those of the files that it builds on, as (key, value)."""
    from omegaconf import OmegaConf

    content: Any = OmegaConf.to_container(OmegaConf.load(CONFIGS / group / f"{choice}.yaml"))
    values: dict[str, Any] = {}
    for base in content.pop("defaults", []):
        values |= values_of(group, base)

    def flat(part: dict[str, Any], prefix: str) -> None:
        for key, value in part.items():
            if isinstance(value, dict):
                flat(value, f"{prefix}{key}.")
            else:
                values[f"{prefix}{key}"] = value

    flat(content, f"{group}.")
    return values


@pytest.mark.parametrize("experiment", EXPERIMENTS)
def test_a_group_that_is_chosen_beside_an_experiment_is_what_runs_or_is_refused(experiment, tmp_path, monkeypatch):
    """In front of the checks of our own: what they refuse, they refuse in words of the keys.

    One choice of every group at a time, since composing takes a while. Where they do not go together, one by one.
    """
    monkeypatch.chdir(tmp_path)
    Path("some.safetensors").touch()
    words = [f"experiment={experiment}"]
    for asked in ("init", "teacher"):
        if _composed_or_refused(words)[1].startswith(f"{asked}=MODEL"):
            words.append(f"{asked}=some.safetensors")
    assert not _composed_or_refused(words)[1]

    for row in zip_longest(*([(group, choice) for choice in choices] for group, choices in GROUPS.items())):
        chosen = dict(pair for pair in row if pair is not None)
        if not _is_what_runs(words, chosen):
            for group, choice in chosen.items():
                _is_what_runs(words, {group: choice})


def _is_what_runs(experiment: list[str], chosen: dict[str, str]) -> bool:
    """Compose an experiment with chosen groups. Return False if it was refused."""
    words = [*experiment, *(f"{group}={choice}" for group, choice in chosen.items())]
    if chosen.get("data", "photos") != "photos":
        words.append("data.root=there")

    config, refusal = _composed_or_refused(words)
    if config is None:
        assert "expected" in refusal or "not set" in refusal
        return False

    for group, choice in chosen.items():
        for key, value in values_of(group, choice).items():
            found: Any = config
            for part in key.split("."):
                found = found[part] if isinstance(found, dict) else getattr(found, part)
            assert found == value, key
    return True


def _composed_or_refused(words: list[str]) -> tuple[TrainConfig | None, str]:
    try:
        return compose(*words), ""
    except InputError as refused:
        return None, str(refused)


def test_a_single_key_wins_over_a_group_and_an_experiment():
    config = compose("experiment=quickstart", "trainer=one_gpu", "trainer.precision=16-mixed", "loss=plain")
    assert config.trainer["accelerator"] == "gpu"
    assert config.trainer["precision"] == "16-mixed"
    assert config.loss.weights.adversarial == 0.0
    assert config.updates == 1000
