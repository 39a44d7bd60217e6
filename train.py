"""Train an autoencoder: `python train.py experiment=quickstart`, `python train.py data=folder data.root=photos`."""

from vae.config import TrainConfig
from vae.door import run


def main(config: TrainConfig) -> None:
    from vae.training.run import train

    train(config)


if __name__ == "__main__":
    run(".", "train", TrainConfig, main)
