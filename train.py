"""Train an autoencoder: `python train.py experiment=quickstart`, `python train.py data=folder data.root=photos`."""

from vae.cli.train import main

if __name__ == "__main__":
    main()
