"""The one test of which every benchmark is an instance; `conftest.py` lists the instances."""

from functools import lru_cache

import pytest

from pera_bench.selection import load

WRONG = 0.1  # of the largest value: more than any precision explains


@lru_cache(maxsize=1)  # what is measured next in the same case takes the same arguments
def made(point, suite, case):
    return load(suite).make(point, case)


def test_bench(number, point, suite, case, direction, implementation, measure, request):
    found = measure(made(point, suite, case), direction, implementation)
    named = {"suite": suite, "case": case, "direction": direction, "asked": implementation, "pass": number}
    sizes = {"recipe": point.recipe, "images": point.images, "precision": point.precision}
    request.node.user_properties.append(("row", {**named, **sizes, **found}))
    if (error := found.get("error")) is not None and not error < WRONG:
        pytest.fail(f"wrong by {error:.2g} of the largest value")
