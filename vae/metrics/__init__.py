"""Measures of reconstructions: one value per image, or one for all images together."""
