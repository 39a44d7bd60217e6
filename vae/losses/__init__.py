"""Functions of tensors that give raw scalars, and their weighted sum."""
