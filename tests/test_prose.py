"""README.md and the pages of docs/ are plain to read: short sentences, few colons and semicolons, the field's words.

Prose is everything but code blocks, headings, pictures, HTML comments and addresses. A link counts by its text. Code
between backticks counts as one word. A cell of a table counts if it is a sentence, so if it ends with a full stop. A
bold beginning such as `**Note.**` is a heading inside a paragraph and does not count as a sentence.

The limits come from documentation of the field that is easy to read. Pages of nanoGPT, torchtitan, diffusers and the
like have 12 to 17 words per sentence, and 0.2 to 0.3 colons and semicolons.
"""

import re
from pathlib import Path
from typing import NamedTuple

import pytest

ROOT = Path(__file__).resolve().parent.parent
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
GENERATED = {"configuration.md"}  # written by a program from the sentences beside each config field
MOST_WORDS = 17.0
MOST_MARKS = 0.35
PLAIN_WORDS = {  # what the pages said before: what they say now
    "averaged weights": "EMA weights",
    "left out": "skipped",
    "is felt": "is added to the loss",
    "is said": "the run says",
    "is told": "reports",
    "of before": "original",
}

NOT_PROSE = re.compile(
    r"^```.*?^```"  # a code block
    r"|<!--.*?-->"
    r"|^#.*?$"  # a heading
    r"|^\|[\s|:-]+\|$"  # the line below a table's head
    r"|^(?:-{3,}|\*{3,})$",  # a rule
    re.DOTALL | re.MULTILINE,
)
ABBREVIATIONS = re.compile(r"\b(e\.g|i\.e|etc|vs|cf|al|approx)\.(?=[\s,)])")
SENTENCE_END = re.compile(r"(?<=[.!?])[\"')*_\]]*(?:\s+|$)")
WORD = re.compile(r"[^\W_]+(?:['.,+/-]?[^\W_]+)*")


class Figures(NamedTuple):
    """Of one page: how many sentences, words a sentence, and colons and semicolons a sentence."""

    sentences: int
    words: float
    marks: float

    def __str__(self) -> str:
        return f"{self.sentences} sentences, {self.words:.1f} words and {self.marks:.2f} colons and semicolons each"


def measure(markdown: str) -> Figures:
    """Measure the prose of a page."""
    sentences = [sentence for block in _blocks(markdown) for sentence in _sentences(block)]
    words = sum(len(WORD.findall(sentence)) for sentence in sentences)
    marks = sum(len(re.findall(r"[:;](?!\w)", sentence)) for sentence in sentences)
    count = max(1, len(sentences))
    return Figures(len(sentences), words / count, marks / count)


def _blocks(markdown: str) -> list[str]:
    """Split a page into paragraphs, list items and those cells of tables that are sentences."""
    text = NOT_PROSE.sub("\n", markdown)
    text = re.sub(r"`[^`]+`", "code", text)
    text = re.sub(r"!\[[^\]]*\]\([^)]*\)", "", text)
    text = re.sub(r"\[([^\]]*)\]\([^)]*\)", r"\1", text)
    text = re.sub(r"https?://[^\s)>]+", "", text)

    blocks: list[str] = []
    for paragraph in re.split(r"\n\s*\n|\n(?=\s*(?:[-*>|]|\d+\.)\s)", text):
        line = " ".join(paragraph.split())
        if line.startswith("|"):
            blocks += [cell.strip() for cell in line.split("|") if cell.strip().endswith(".")]
        elif line:
            blocks.append(re.sub(r"^(?:[-*>]|\d+\.)\s+", "", line))
    return blocks


def _sentences(block: str) -> list[str]:
    """Split a block at the ends of its sentences, without a bold beginning."""
    text = re.sub(r"^\*\*[^*]+[.:?]\*\*\s*", "", block)
    text = ABBREVIATIONS.sub(lambda found: found.group(1).replace(".", ""), text)
    return [sentence for sentence in SENTENCE_END.split(text) if WORD.search(sentence)]


@pytest.mark.parametrize("page", [page for page in PAGES if page.name not in GENERATED], ids=lambda page: page.name)
def test_a_page_has_short_sentences_with_few_colons_and_semicolons(page: Path) -> None:
    figures = measure(page.read_text(encoding="utf-8"))
    is_plain = figures.words <= MOST_WORDS and figures.marks <= MOST_MARKS
    assert is_plain, f"{page.relative_to(ROOT)}: {figures}; at most {MOST_WORDS:g} words and {MOST_MARKS} marks"


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_a_page_uses_the_words_of_the_field(page: Path) -> None:
    prose = " ".join(_blocks(page.read_text(encoding="utf-8"))).lower()
    assert {words: plain for words, plain in PLAIN_WORDS.items() if words in prose} == {}


def test_what_is_not_prose_is_not_counted() -> None:
    page = """# A heading: not counted; at all

**A beginning.** Two words. See [the page](https://example.com/a;b:c) e.g. `python train.py a=b; c` now: it runs.

| key: x | one; two |
|---|---|
| a; b | This cell is a sentence. |

- An item
- Another; item

```bash
one two three: four; five. Six
```
"""
    assert measure(page) == Figures(sentences=5, words=(2 + 8 + 5 + 2 + 2) / 5, marks=2 / 5)


def test_a_chain_of_fragments_is_caught() -> None:
    chain = "The order is exact; crops, noise and flips are functions of seed and position: the same for any number."
    assert measure(chain).marks > MOST_MARKS
    assert measure(" ".join(["word"] * 30) + ".").words > MOST_WORDS
