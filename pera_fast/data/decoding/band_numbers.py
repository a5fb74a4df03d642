"""Numbers of the bands that data.bands names."""

from collections.abc import Sequence

Bands = tuple[int | str, ...]  # data.bands; empty: all


def band_numbers(bands: Bands, count: int, names: Sequence[str | None]) -> list[int]:
    """Numbers from 1 of bands that are numbers or names already. Raises ValueError for what is not there."""
    known = {name.strip().casefold(): number for number, name in reversed(list(enumerate(names, 1))) if name}
    numbers = []
    for band in bands:
        number = band if isinstance(band, int) else known.get(band.strip().casefold())
        if number is None:
            has = f"its bands are {', '.join(name or '-' for name in names)}" if known else "its bands have no names"
            raise ValueError(f"has no band {band}: {has}")
        if number > count:
            raise ValueError(f"has no band {number}: it has {count} band(s)")
        numbers.append(number)
    return numbers
