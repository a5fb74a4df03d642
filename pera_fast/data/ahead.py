"""Works on a few items ahead in threads, and yields results in the order of the items."""

from collections import deque
from collections.abc import Callable, Generator, Iterable
from concurrent.futures import Future, ThreadPoolExecutor
from typing import TypeVar

Item = TypeVar("Item")
Result = TypeVar("Result")


def map_ahead(
    function: Callable[[Item], Result],
    items: Iterable[Item],
    threads: int,
    ahead: int,
    name: str,
    stop: Callable[[], None] = lambda: None,
) -> Generator[Result, None, None]:
    """Apply a function to items in threads; unlike ``Executor.map`` it holds a bounded number of results.

    Args:
        function: runs in the threads.
        items: taken as results are consumed.
        threads: how many.
        ahead: items under way for each thread.
        name: prefix of the threads' names.
        stop: called at the end, before the threads are waited for: ends what they may wait for.

    Yields:
        Results in the order of the items. An exception of the function is raised here; what had not begun is then
        left out.
    """
    pool = ThreadPoolExecutor(threads, thread_name_prefix=name)
    under_way: deque[Future[Result]] = deque()
    try:
        for item in items:
            under_way.append(pool.submit(function, item))
            if len(under_way) > threads * ahead:
                yield under_way.popleft().result()
        while under_way:
            yield under_way.popleft().result()
    finally:
        stop()
        pool.shutdown(cancel_futures=True)
