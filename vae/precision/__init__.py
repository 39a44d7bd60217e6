"""What float16 does to an autoencoder, its exact repair, and how far latents have moved from another's."""
