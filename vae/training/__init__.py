"""Training: `vae.training.run.train` runs a configuration. Nothing is imported here: configurations stay light."""
