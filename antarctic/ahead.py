"""Reading by threads, ahead of whoever needs what is read: in order, within bounds of memory."""

from collections import deque
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from threading import Condition


class Budget:
    """An amount of something, such as pixels in memory, that threads share. Whoever needs more than
    there is at all gets it alone."""

    def __init__(self, most):
        self.most, self.used, self.changed = most, 0, Condition()

    @contextmanager
    def share(self, amount):
        """Waits until there is so much, which nobody else has while the body runs."""
        with self.changed:
            self.changed.wait_for(lambda: not self.used or self.used + amount <= self.most)
            self.used += amount
        try:
            yield
        finally:
            with self.changed:
                self.used -= amount
                self.changed.notify_all()


def map_ahead(function, items, workers, ahead):
    """Yields function(item) of each item, in their order, computed by so many threads. At most
    `ahead` results exist beside the one that is yielded. workers: 0 computes each when it is asked
    for, in the caller's thread. Close it where it may not come to its end: what has not begun then
    never does."""
    if not workers:
        yield from map(function, items)
        return
    pool, running = ThreadPoolExecutor(workers, "reader"), deque()
    try:
        for item in items:
            running.append(pool.submit(function, item))
            if len(running) > ahead:
                yield running.popleft().result()
        while running:
            yield running.popleft().result()
    finally:  # not waiting for what runs, since Ctrl-C does not
        pool.shutdown(wait=False, cancel_futures=True)
