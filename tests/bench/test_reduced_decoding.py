"""The bench of reduced decoding: small, and its numbers mean something."""

import numpy as np
from PIL import Image

from reduced_decoding import compare


def test_differences_are_small_and_fall_with_the_room(tmp_path):
    smooth = np.random.default_rng(0).integers(0, 256, (8, 8, 3), np.uint8)
    for number in range(2):
        Image.fromarray(smooth + number).resize((64, 64), Image.Resampling.BICUBIC).save(tmp_path / f"{number}.png")
    found = compare(sorted(tmp_path.iterdir()), "tiny", [512, 768], images=1, epochs=3)
    mean = {key: np.mean(values, axis=0)[1] for key, values in found.items()}
    assert {group for _, group in found} == {"global", "local"}
    assert all(0 < value < 3 for value in mean.values())
    numbers = sorted(number for number, group in found if group == "global")
    assert len(numbers) > 1
    assert mean[numbers[-1], "global"] < mean[numbers[0], "global"]
