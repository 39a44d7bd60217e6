"""Train, fine-tune and measure Stable-Diffusion-style KL autoencoders.

The public names are listed in `__init__.pyi`. Each is imported when it is first used, so that `import vae` costs
nothing.
"""

import lazy_loader

__version__ = "0.1.0"

__getattr__, __dir__, __all__ = lazy_loader.attach_stub(__name__, __file__)
