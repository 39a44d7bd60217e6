"""The pages say what is true: every `vae` command in them exists with the options given."""

import re
from pathlib import Path

import pytest
from typer.main import get_command

from vae.cli import app

ROOT = Path(__file__).resolve().parent.parent
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
COMMANDS = {
    (page.name, line.strip())
    for page in PAGES
    for block in re.findall(r"```bash\n(.*?)```", page.read_text(), re.DOTALL)
    for line in block.splitlines()
    if line.startswith("vae ")
}


@pytest.mark.parametrize(("page", "line"), sorted(COMMANDS))
def test_every_command_in_the_pages_exists_with_its_options(page, line):
    words = line.partition("#")[0].split()
    command = get_command(app).commands[words[1]]  # pyright: ignore[reportAttributeAccessIssue]
    options = {option for parameter in command.params for option in parameter.opts}
    assert {word for word in words[2:] if word.startswith("--")} <= options


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_every_link_to_a_file_of_ours_leads_somewhere(page):
    links = re.findall(r"\]\(([^)#:]+)\)", page.read_text())
    assert [link for link in links if not (page.parent / link).exists()] == []


def test_the_tree_in_the_readme_is_the_tree():
    """Every module of the package stands in it, and nothing that does not exist."""
    block = (ROOT / "README.md").read_text().partition("## The tree")[2].split("```")[1]
    listed = set(re.findall(r"^ *([\w]+\.py) ", block, re.MULTILINE))
    real = {path.name for path in (ROOT / "vae").rglob("*.py")} - {"__init__.py"}
    assert listed - {"__init__.py", "train.py"} == real


def test_every_test_that_the_page_of_traps_names_is_in_the_file_it_links_to():
    page = ROOT / "docs" / "traps.md"
    named = re.findall(r"\[(test_\w+)\]\((\.\./tests/[^)]+\.py)\)", page.read_text())
    assert named
    sources = {link: path.read_text() for _, link in named if (path := page.parent / link).exists()}
    assert [pair for pair in named if not re.search(rf"^def {pair[0]}\(", sources.get(pair[1], ""), re.MULTILINE)] == []
