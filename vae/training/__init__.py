"""Training: `vae.training.train.train` runs a configuration. Nothing is imported here: configurations stay light."""
