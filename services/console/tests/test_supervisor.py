import asyncio
import os
import signal
import socket
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from urllib.parse import urlsplit

import psutil
import pytest

from llmpilot_console import tether
from llmpilot_console.child import Child
from llmpilot_console.members import Launch
from llmpilot_console.supervisor import Patience, Supervisor, running_in_background
from llmpilot_contracts.errors import PreconditionError, UnavailableError
from llmpilot_servicekit.client import wait_until_serving
from llmpilot_servicekit.process_exit import describe_exit

pytestmark = pytest.mark.usefixtures("plugins")

STEADY = {"steady": "steady_service"}
DEADLINE_SECONDS = 30
Eventually = Callable[[Callable[[], bool]], None]


def _nats_greets(url: str) -> bool:
    address = urlsplit(url)
    try:
        with socket.create_connection((address.hostname, address.port), timeout=DEADLINE_SECONDS) as connection:
            return connection.recv(4) == b"INFO"
    except ConnectionError:
        return False


def _child(word: str) -> psutil.Process | None:
    """The child process whose command line ends with or starts with `word`."""
    for process in psutil.Process().children():
        try:
            command = process.cmdline()
        except psutil.NoSuchProcess:
            continue
        if command and (command[-1] == word or Path(command[0]).name == word):
            return process
    return None


def _kill(word: str) -> None:
    process = _child(word)
    assert process is not None
    process.kill()


def test_a_started_platform_serves_and_is_announced(state_dir: Path) -> None:
    supervisor = Supervisor(state_dir, STEADY)
    with running_in_background(supervisor) as run:
        wait_until_serving(run.platform.services["steady"].grpc, DEADLINE_SECONDS)
        assert _nats_greets(run.platform.nats_url)
        assert supervisor.state.announced() == run.platform
        assert run.platform.pid == os.getpid()
    assert supervisor.state.announced() is None


def test_stopping_ends_every_process_and_lets_services_finish(state_dir: Path) -> None:
    with running_in_background(Supervisor(state_dir, STEADY)):
        processes = psutil.Process().children()
        assert len(processes) == 2
    assert not any(process.is_running() for process in processes)
    assert "stopped" in (state_dir / "logs" / "steady.log").read_text()


def test_every_child_is_a_process_group_of_its_own(state_dir: Path) -> None:
    with running_in_background(Supervisor(state_dir, STEADY)):
        assert all(os.getpgid(process.pid) == process.pid for process in psutil.Process().children())


def test_a_service_that_dies_is_restarted_on_the_same_ports(state_dir: Path, eventually: Eventually) -> None:
    reports: list[str] = []
    with running_in_background(Supervisor(state_dir, STEADY, report=reports.append)) as run:
        addresses = run.platform.services["steady"]
        _kill("steady_service")
        eventually(lambda: bool(reports))
        wait_until_serving(addresses.grpc, DEADLINE_SECONDS)
        assert addresses.metrics is not None
        host, port = addresses.metrics.split(":")
        socket.create_connection((host, int(port)), timeout=DEADLINE_SECONDS).close()
    assert reports == [
        f"steady was killed by SIGKILL; starting it again in 0.2 s (log: {state_dir / 'logs' / 'steady.log'})"
    ]


def test_a_nats_server_that_dies_is_restarted_on_the_same_port(state_dir: Path, eventually: Eventually) -> None:
    reports: list[str] = []
    with running_in_background(Supervisor(state_dir, STEADY, report=reports.append)) as run:
        _kill("nats-server")
        eventually(lambda: bool(reports))
        eventually(lambda: _nats_greets(run.platform.nats_url))


def test_the_wait_before_a_restart_doubles_up_to_a_limit(
    state_dir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, eventually: Eventually
) -> None:
    monkeypatch.setenv("CONSOLE_TEST_MARKER", str(tmp_path / "marker"))
    reports: list[str] = []
    patience = Patience(first_restart_seconds=0.01, last_restart_seconds=0.03)
    supervisor = Supervisor(state_dir, {"once": "once_service"}, report=reports.append, patience=patience)
    with running_in_background(supervisor):
        _kill("once_service")
        eventually(lambda: len(reports) >= 4)
    waits = [report.split(" again in ")[1].split(" (")[0] for report in reports[:4]]
    assert waits == ["0.01 s", "0.02 s", "0.03 s", "0.03 s"]
    assert "once ended with code 1" in reports[1]


def test_a_service_that_fails_at_start_is_reported_with_its_log(state_dir: Path) -> None:
    supervisor = Supervisor(state_dir, {**STEADY, "failing": "failing_service"})
    with (
        pytest.raises(
            PreconditionError,
            match=r"^failing ended with code 1; .*failing\.log:\n  \| the model is missing: train one$",
        ),
        running_in_background(supervisor),
    ):
        pass
    assert supervisor.state.announced() is None


def test_a_service_that_never_serves_is_given_up(state_dir: Path) -> None:
    supervisor = Supervisor(state_dir, {"silent": "silent_service"}, patience=Patience(start_seconds=1))
    with (
        pytest.raises(UnavailableError, match=r"silent is not ready after 1 s(?s:.)*loading for ever"),
        running_in_background(supervisor),
    ):
        pass


def test_a_second_platform_in_the_same_folder_is_refused(state_dir: Path) -> None:
    with running_in_background(Supervisor(state_dir, STEADY)) as run:
        where = f"process {os.getpid()}; steady at {run.platform.services['steady'].grpc}"
        with pytest.raises(PreconditionError, match=where), running_in_background(Supervisor(state_dir, STEADY)):
            pass
        wait_until_serving(run.platform.services["steady"].grpc, DEADLINE_SECONDS)


def test_the_log_of_the_run_before_is_kept(state_dir: Path) -> None:
    for _ in range(2):
        with running_in_background(Supervisor(state_dir, STEADY)):
            pass
    logs = sorted(path.name for path in (state_dir / "logs").iterdir())
    assert logs == ["nats.log", "nats.log.1", "steady.log", "steady.log.1"]


def test_a_child_deaf_to_sigterm_is_killed_after_the_grace(tmp_path: Path, eventually: Eventually) -> None:
    script = "import signal; signal.signal(signal.SIGTERM, signal.SIG_IGN); print('deaf', flush=True); signal.pause()"
    child = Child("deaf", tmp_path / "deaf.log")

    async def run() -> None:
        await child.start(Launch(command=(sys.executable, "-ISc", script), environment={}))
        await asyncio.to_thread(eventually, lambda: child.log_tail() == "deaf")
        await child.stop(0.05)

    asyncio.run(run())
    assert child.exit_code == -signal.SIGKILL


def test_killing_a_child_that_has_just_ended_is_no_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The thread that reaps a process is ahead of the event loop that learns of it."""
    child = Child("ended", tmp_path / "ended.log")

    def kill_group(_process_group: int, _number: int) -> None:
        raise ProcessLookupError

    async def run() -> None:
        await child.start(Launch(command=(sys.executable, "-ISc", "import time; time.sleep(60)"), environment={}))
        with monkeypatch.context() as patched:
            patched.setattr(os, "killpg", kill_group)
            child.kill()
        child.kill()
        await child.wait()

    asyncio.run(run())


@pytest.mark.parametrize(
    ("exit_code", "words"),
    [
        (0, "ended with code 0"),
        (3, "ended with code 3"),
        (-15, "was killed by SIGTERM"),
        (-40, "was killed by signal 40"),
    ],
)
def test_exit_codes_are_worded(exit_code: int, words: str) -> None:
    assert describe_exit(exit_code) == words


@pytest.mark.skipif(sys.platform != "linux", reason="elsewhere the launcher only runs the command")
def test_a_launcher_whose_parent_has_gone_does_not_run_the_command() -> None:
    someone_else = str(os.getppid())
    command = [sys.executable, tether.__file__, someone_else, sys.executable, "-ISc", "print('ran')"]
    result = subprocess.run(command, capture_output=True, timeout=DEADLINE_SECONDS, check=False)
    assert (result.returncode, result.stdout) == (1, b"")
