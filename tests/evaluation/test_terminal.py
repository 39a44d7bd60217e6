"""What an evaluation prints, and its table as Markdown."""

import re

import pytest

from tests.conftest import read_json
from vae.config.data import DataConfig
from vae.config.schema import EvaluateConfig
from vae.evaluation import terminal
from vae.evaluation.evaluate import evaluate
from vae.models.autoencoder_kl import AutoencoderKL
from vae.weights import save_autoencoder


@pytest.fixture
def folder(tmp_path, tiny):
    for name in ("first", "se|cond"):
        save_autoencoder(AutoencoderKL(tiny), tmp_path / name)
    config = EvaluateConfig(
        model=[str(tmp_path / "first"), str(tmp_path / "se|cond")],
        data=DataConfig(source="photos", resolution=32, workers=0),
        metrics=["psnr", "ssim"],
        output=str(tmp_path / "evaluations"),
        probe_images=0,
    )
    return evaluate(config)


def test_the_markdown_table_has_the_numbers_of_the_document(folder):
    """One row a metric, one column a model; a bar in a name does not add a column."""
    document = read_json(folder / "metrics.json")
    lines = (folder / "table.md").read_text().splitlines()
    head, rule, *rows = [re.split(r"(?<!\\)\|", line)[1:-1] for line in lines if line.startswith("|")]
    assert [cell.strip() for cell in head] == ["", "first", r"se\|cond"]
    assert len(rule) == 3
    assert [row[0].strip() for row in rows] == ["PSNR dB ↑", "SSIM ↑"]
    means = [document["metrics"]["photos"][model]["psnr"]["mean"] for model in ("first", "se|cond")]
    assert [cell.strip().split(" ")[0] for cell in rows[0][1:]] == [f"{mean:.3f}" for mean in means]
    assert document["protocol"]["sha256"] in lines[-1]


def _comparison(low, high, verdict="no difference shown"):
    return {"verdict": verdict, "low": low, "high": high}


def test_a_difference_that_only_its_own_interval_shows_is_counted_apart(capsys):
    """D14: 'no difference in 4 of 6', and below it a 'perhaps better' and three without a difference."""
    none = [_comparison(-0.1, 0.2), _comparison(-0.1, 0.1), _comparison(None, None), _comparison(0.01, 0.2)]
    shown = [_comparison(0.1, 0.2, "a is better than b"), _comparison(-0.2, -0.1, "b is better than a")]
    terminal._comparisons([*shown, *none])
    said = capsys.readouterr().out
    count = "no difference shown in 4 of 6 comparisons, corrected for their number"
    assert f"{count}, though 1 of them, looked at alone, may be one" in said


def test_without_verbose_only_verdicts_are_printed(folder, capsys):
    document = read_json(folder / "metrics.json")
    terminal.document(document, verbose=False)
    assert capsys.readouterr().out == ""
    terminal.document(document)
    assert "PSNR" in capsys.readouterr().out
