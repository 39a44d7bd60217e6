"""Measure reconstructions: `python evaluate.py model=runs/first data=photos`."""

from vae.config.compose import run
from vae.config.schema import EvaluateConfig


def main(config: EvaluateConfig) -> None:
    from vae.evaluation.evaluate import evaluate

    evaluate(config)


if __name__ == "__main__":
    run("evaluate", "evaluate", EvaluateConfig, main)
