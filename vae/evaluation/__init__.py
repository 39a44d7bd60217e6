"""Evaluation: `vae.evaluation.run.evaluate` measures models on images."""
