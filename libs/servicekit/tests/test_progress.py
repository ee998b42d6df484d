import io
import threading
from collections.abc import Iterator

from llmpilot_servicekit.progress import noted_if_slow, shown_progress


def _shown(clock: Iterator[float], *steps: tuple[int, int | None]) -> list[str]:
    stream = io.StringIO()
    with shown_progress("files read", stream=stream, monotonic=lambda: next(clock)) as advance:
        for done, total in steps:
            advance(done, total)
    return stream.getvalue().splitlines()


def test_off_a_terminal_a_line_comes_every_five_seconds_and_at_the_end() -> None:
    seconds = iter([0.0, 1.0, 5.0, 9.9, 10.0, 10.1])
    lines = _shown(seconds, (1, 9), (2, 9), (3, 9), (4, 9), (9, 9))
    assert lines == ["files read: 2 of 9", "files read: 4 of 9", "files read: 9 of 9"]


def test_an_unknown_total_is_left_out() -> None:
    assert _shown(iter([0.0, 6.0]), (7, None)) == ["files read: 7"]


def test_a_long_line_is_not_broken() -> None:
    stream = io.StringIO()
    with shown_progress("x" * 300, stream=stream) as advance:
        advance(1, 1)
    assert stream.getvalue() == f"{'x' * 300}: 1 of 1\n"


class _Heard(io.StringIO):
    """A stream that says when a whole line was written."""

    def __init__(self) -> None:
        super().__init__()
        self.line_written = threading.Event()

    def write(self, text: str) -> int:
        """Keep the text."""
        written = super().write(text)
        if "\n" in text:
            self.line_written.set()
        return written


def test_a_note_is_printed_where_work_is_slow() -> None:
    stream = _Heard()
    with noted_if_slow("compiling", seconds=0.001, stream=stream):
        assert stream.line_written.wait(timeout=10)
    assert stream.getvalue() == "compiling\n"


def test_no_note_is_printed_where_work_is_quick() -> None:
    stream = io.StringIO()
    with noted_if_slow("compiling", seconds=3600, stream=stream):
        pass
    assert stream.getvalue() == ""
