"""Measure reconstructions: `python evaluate.py model=runs/first data=photos`."""

from vae.config import EvaluateConfig
from vae.door import run


def main(config: EvaluateConfig) -> None:
    from vae.evaluation.run import evaluate

    evaluate(config)


if __name__ == "__main__":
    run("evaluate", "evaluate", EvaluateConfig, main)
