import threading
from collections.abc import Iterator

import pytest

from llmpilot_workload_generator.traces.read_ahead import read_ahead


def test_everything_comes_in_its_order() -> None:
    assert list(read_ahead(iter(range(100)))) == list(range(100))
    assert list(read_ahead(iter(()))) == []


def test_the_next_is_read_while_the_last_is_worked_on() -> None:
    """The second is asked for without the caller asking."""
    second_was_read = threading.Event()

    def numbers() -> Iterator[int]:
        yield 1
        second_was_read.set()
        yield 2

    ahead = read_ahead(numbers())
    assert next(ahead) == 1
    assert second_was_read.wait(timeout=10)
    assert list(ahead) == [2]


@pytest.mark.parametrize("taken", [0, 1, 2, 3])
def test_closing_ends_the_thread_and_closes_what_it_read_from(taken: int) -> None:
    threads_before = threading.active_count()
    is_open = []

    def numbers() -> Iterator[int]:
        is_open.append(True)
        try:
            yield from range(3)
        finally:
            is_open.pop()

    ahead = read_ahead(numbers())
    for _ in range(taken):
        next(ahead)
    ahead.close()
    assert not is_open
    assert threading.active_count() == threads_before


def test_an_error_reaches_the_caller_after_what_came_before() -> None:
    def numbers() -> Iterator[int]:
        yield 1
        raise ValueError("damaged")

    ahead = read_ahead(numbers())
    assert next(ahead) == 1
    with pytest.raises(ValueError, match="damaged"):
        next(ahead)
