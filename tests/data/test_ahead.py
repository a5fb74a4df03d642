"""Work on items ahead: results in order, few at a time, and an end after an error."""

import threading
import time

import pytest

from pera_fast.data.ahead import map_ahead


def test_results_come_in_the_order_of_the_items() -> None:
    def slow_if_even(x: int) -> int:
        time.sleep(0.002 * (x % 2 == 0))
        return 10 * x

    assert list(map_ahead(slow_if_even, range(40), 4, 2, "test")) == [10 * x for x in range(40)]


def test_few_items_are_under_way() -> None:
    taken = []

    def items():
        for x in range(100):
            taken.append(x)
            yield x

    results = map_ahead(lambda x: x, items(), 2, 3, "test")
    assert next(results) == 0
    assert len(taken) == 2 * 3 + 1
    results.close()


def test_an_error_ends_the_work() -> None:
    names = set()

    def fails_at_three(x: int) -> int:
        names.add(threading.current_thread().name.rpartition("_")[0])
        if x == 3:
            raise ValueError("three")
        return x

    results = map_ahead(fails_at_three, range(1000), 2, 2, "test-ahead")
    with pytest.raises(ValueError, match="three"):
        list(results)
    assert names == {"test-ahead"}
    assert not [t for t in threading.enumerate() if t.name.startswith("test-ahead")]
