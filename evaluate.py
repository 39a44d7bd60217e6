"""Measure reconstructions: `python evaluate.py model=runs/first data=photos`."""

from vae.cli.evaluate import main

if __name__ == "__main__":
    main()
