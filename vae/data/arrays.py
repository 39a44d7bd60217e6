"""Pixels that Pillow has no mode for: .npy arrays, and TIFF files of many channels or of 16-bit colour."""

import io

import numpy as np

SIGNATURES = {b"\x93NUMPY": "npy", b"II*\0": "tiff", b"MM\0*": "tiff", b"II+\0": "tiff", b"MM\0+": "tiff"}
LONGEST_SIGNATURE = 6


def kind_of(start: bytes) -> str | None:
    """ "npy" or "tiff", by the first bytes of a file."""
    return next((kind for signature, kind in SIGNATURES.items() if start.startswith(signature)), None)


def npy_shape(data: bytes) -> tuple[int, ...]:
    """(H, W) or (H, W, C), from the header, which must not promise more than there is."""
    stream = io.BytesIO(data)
    major, _ = np.lib.format.read_magic(stream)
    read = np.lib.format.read_array_header_1_0 if major == 1 else np.lib.format.read_array_header_2_0
    shape, _, dtype = read(stream)
    promised = int(np.prod(shape, dtype=object)) * dtype.itemsize
    if len(shape) not in (2, 3) or dtype.hasobject or promised > len(data):
        raise ValueError(f"{dtype} numbers of shape {shape} in {len(data)} bytes, expected (H, W) or (H, W, C) of them")
    return shape


def read_npy(data: bytes) -> np.ndarray:
    """Nothing in the file is executed."""
    return np.load(io.BytesIO(data), allow_pickle=False)


def tiff_shape(stream: "io.IOBase") -> tuple[int, int]:
    """(height, width) of the first page."""
    import tifffile  # comes with scikit-image

    with tifffile.TiffFile(stream) as file:  # pyright: ignore[reportArgumentType]
        page = file.pages[0]
        return page.imagelength, page.imagewidth  # pyright: ignore[reportAttributeAccessIssue]


def read_tiff(data: bytes) -> np.ndarray:
    """The first page as (H, W) or (H, W, C)."""
    import tifffile

    with tifffile.TiffFile(io.BytesIO(data)) as file:
        page = file.pages[0]
        values = page.asarray()
        return np.moveaxis(values, 0, -1) if page.axes == "SYX" else values  # pyright: ignore[reportAttributeAccessIssue]
