"""Work done once before training: images made smaller into shards, latents of a finished autoencoder."""
