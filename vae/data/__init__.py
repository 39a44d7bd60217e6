"""Images: opening, cropping, ordering, batching, and showing them."""
