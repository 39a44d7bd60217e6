"""Train an autoencoder: `python train.py experiment=quickstart`, `python train.py data=folder data.root=photos`."""

from vae.config.compose import run
from vae.config.schema import TrainConfig


def main(config: TrainConfig) -> None:
    if config.plan:
        from vae.training.plan.plan import plan
        from vae.training.plan.show import show

        show(plan(config))
    else:
        from vae.evaluation.after_training import after_training
        from vae.training.train import train

        after_training(config, train(config))


if __name__ == "__main__":
    run(".", "train", TrainConfig, main)
