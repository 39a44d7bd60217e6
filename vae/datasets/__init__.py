"""Data sets made once before training: images made smaller into shards, and latents of a finished autoencoder."""
