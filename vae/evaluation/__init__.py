"""Evaluation: `vae.evaluation.evaluate.evaluate` measures models on images."""
