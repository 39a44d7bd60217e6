"""Training: `vae.training.train.train` runs a configuration. Nothing is imported here, so configurations load fast."""
