"""Loss terms as raw scalars, and their weighted sum."""
