"""Reads the next batch while the one before is worked on.

Invariant: batches come in their order, and when the generator is closed the thread has ended and what it read from is
closed.
"""

from collections.abc import Generator, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing
from typing import TypeVar

_B = TypeVar("_B")


def read_ahead(batches: Iterator[_B]) -> Generator[_B, None, None]:
    """Yield what an iterator yields, of which a thread asks for the next while the caller has the last."""
    with closing(_each(batches)) as closed_last, ThreadPoolExecutor(1, "read-ahead") as reader:
        coming = reader.submit(next, closed_last, None)
        while (batch := coming.result()) is not None:
            coming = reader.submit(next, closed_last, None)
            yield batch


def _each(batches: Iterator[_B]) -> Generator[_B, None, None]:
    yield from batches
