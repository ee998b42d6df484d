import os
import time
import uuid
from collections.abc import Iterator

import hypothesis
import psutil
import pytest

DEADLINE_SECONDS = 10
POLL_SECONDS = 0.01
MARK = "LLMPILOT_TUNER_TEST_RUN"

hypothesis.settings.register_profile("any-machine", deadline=None)  # how busy the machine is, is no failure
hypothesis.settings.load_profile("any-machine")


@pytest.fixture(scope="module", autouse=True)
def _no_worker_is_left() -> Iterator[None]:
    """Every module's probers end all their workers, and what those have made, wherever in the process tree it is."""
    mark = uuid.uuid4().hex
    os.environ[MARK] = mark
    yield
    del os.environ[MARK]
    deadline = time.monotonic() + DEADLINE_SECONDS
    while left := workers_marked(mark):
        assert time.monotonic() < deadline, f"left behind: {left}"
        time.sleep(POLL_SECONDS)


def workers_marked(mark: str) -> list[str]:
    """The command lines of living worker processes that have inherited a mark."""
    found = []
    for process in psutil.process_iter():
        try:
            words = process.cmdline()
            if "torch_worker" not in " ".join(words) or process.status() == psutil.STATUS_ZOMBIE:
                continue
            if process.environ().get(MARK) == mark and process.pid != os.getpid():
                found.append(f"{process.pid} {' '.join(words)}")
        except (psutil.NoSuchProcess, psutil.AccessDenied):
            continue
    return found
