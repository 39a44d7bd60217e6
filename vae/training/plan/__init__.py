"""The plan of a run: what it will need and take, before it is started."""
