"""Turns arrays by their orientation, as EXIF numbers it."""

import numpy as np

TURNED = (5, 6, 7, 8)  # orientations that swap width and height


def upright(array: np.ndarray, orientation: int) -> np.ndarray:
    """[..., H, W] as it is stored to how it is to be looked at; orientation as EXIF numbers it."""
    if orientation in TURNED:
        array = np.swapaxes(array, -1, -2)
    if orientation in (3, 4, 7, 8):
        array = array[..., ::-1, :]
    if orientation in (2, 3, 6, 7):
        array = array[..., ::-1]
    return array
