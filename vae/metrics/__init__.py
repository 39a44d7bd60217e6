"""Measures of reconstructions, one value per image."""
