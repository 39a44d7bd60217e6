"""Evaluation of autoencoders on images; the entry point is `vae.evaluation.evaluate.evaluate`."""
