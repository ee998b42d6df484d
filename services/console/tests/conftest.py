import os
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import psutil
import pytest

PROGRAMS = Path(__file__).parent / "programs"
DEADLINE_SECONDS = 60
POLL_SECONDS = 0.01

ENTRY_POINTS = """
[llmpilot.services]
recommender = steady_service:main

[llmpilot.commands]
greet = plugin_commands:greet
refuse-input = plugin_commands:refuse_input
refuse = plugin_commands:refuse
refuse-in-tasks = plugin_commands:refuse_in_tasks
interrupted = plugin_commands:interrupted
hold = plugin_commands:hold
broken = broken_plugin:command
no-command = plugin_commands:signal
"""

Eventually = Callable[[Callable[[], bool]], None]


@pytest.fixture(autouse=True)
def no_process_is_left() -> Iterator[None]:
    yield
    left = psutil.Process().children(recursive=True)
    for process in left:
        process.kill()
    psutil.wait_procs(left)
    assert left == []


@pytest.fixture(scope="session")
def eventually() -> Eventually:
    """Waits until a condition holds."""

    def wait(condition: Callable[[], bool]) -> None:
        deadline = time.monotonic() + DEADLINE_SECONDS
        while not condition():
            assert time.monotonic() < deadline, "the condition never held"
            time.sleep(POLL_SECONDS)

    return wait


@pytest.fixture
def state_dir(tmp_path: Path) -> Path:
    return tmp_path / "state"


@pytest.fixture
def plugins(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, state_dir: Path) -> None:
    """A distribution with commands and a service, for this process and its children."""
    site = tmp_path / "site"
    metadata = site / "acme_plugin-1.0.dist-info"
    metadata.mkdir(parents=True)
    (metadata / "METADATA").write_text("Metadata-Version: 2.1\nName: acme-plugin\nVersion: 1.0\n")
    (metadata / "entry_points.txt").write_text(ENTRY_POINTS)
    for folder in (site, PROGRAMS):
        monkeypatch.syspath_prepend(folder)
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join(map(str, (site, PROGRAMS))))
    monkeypatch.setenv("LLMPILOT_HOME", str(state_dir))
    monkeypatch.delenv("LLMPILOT_RECOMMENDER_ADDRESS", raising=False)
    for name in [name for name, module in sys.modules.items() if _is_program(module)]:
        monkeypatch.delitem(sys.modules, name)


def _is_program(module: object) -> bool:
    return Path(getattr(module, "__file__", None) or "/").parent == PROGRAMS
