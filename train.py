"""Train an autoencoder: `python train.py experiment=quickstart`, `python train.py data=folder data.root=photos`."""

from vae.config import TrainConfig
from vae.door import run


def main(config: TrainConfig) -> None:
    if config.plan:
        from vae.training.planning.plan import plan
        from vae.training.planning.show import show

        show(plan(config))
    else:
        from vae.evaluation.tuned import after_training
        from vae.training.run import train

        after_training(config, train(config))


if __name__ == "__main__":
    run(".", "train", TrainConfig, main)
