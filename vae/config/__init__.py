"""The description of a run: typed values that Hydra fills. This package imports nothing of what it describes."""
