"""The precision of an autoencoder: what float16 does to it, and the exact repair."""
