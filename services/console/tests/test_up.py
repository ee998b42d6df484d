"""The `llm-pilot` process as a shell sees it."""

import os
import signal
import socket
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from tempfile import TemporaryFile

import psutil
import pytest

from llmpilot_console.plugins import installed_services
from llmpilot_console.state_directory import RunningPlatform, ServiceAddresses, StateDirectory
from llmpilot_console.supervisor import Patience
from llmpilot_console.up import describe
from llmpilot_servicekit.client import wait_until_serving

pytestmark = pytest.mark.usefixtures("plugins")

PILOT = [sys.executable, "-m", "llmpilot_console"]
DEADLINE_SECONDS = 60
RUNNING = RunningPlatform(
    pid=1,
    nats_url="nats://127.0.0.1:2",
    services={"recommender": ServiceAddresses(grpc="127.0.0.1:3", metrics="127.0.0.1:4")},
)
PLATFORM_PROCESSES = 1 + len(installed_services())
"""nats-server and a process for each service."""
COMMAND_PROCESSES = 2
"""nats-server and the one service that a command needs."""
Eventually = Callable[[Callable[[], bool]], None]


@pytest.fixture(autouse=True)
def ctrl_c_is_heard() -> Iterator[None]:
    """A shell starts background jobs deaf to SIGINT, and children inherit that."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


@contextmanager
def _started(*arguments: str) -> Iterator[subprocess.Popen[str]]:
    """Start `llm-pilot` as a terminal does: the leader of the process group that Ctrl-C reaches."""
    with TemporaryFile("w+") as errors:
        process = subprocess.Popen(
            [*PILOT, *arguments], stdout=subprocess.PIPE, stderr=errors, text=True, process_group=0
        )
        try:
            yield process
        finally:
            process.kill()
            process.communicate()
            errors.seek(0)
            sys.stderr.write(errors.read())  # pytest shows it where a test fails


def _ctrl_c(process: subprocess.Popen[str]) -> None:
    os.killpg(process.pid, signal.SIGINT)


def _running(state_dir: Path, eventually: Eventually) -> RunningPlatform:
    state = StateDirectory(state_dir)
    eventually(lambda: state.announced() is not None)
    platform = state.announced()
    assert platform is not None
    return platform


def _children_of(process: subprocess.Popen[str], count: int, eventually: Eventually) -> list[psutil.Process]:
    parent = psutil.Process(process.pid)
    eventually(lambda: len(parent.children()) == count)
    return parent.children()


def _all_gone(processes: list[psutil.Process]) -> bool:
    _, left = psutil.wait_procs(processes, timeout=DEADLINE_SECONDS)
    for process in left:
        process.kill()
    return not left


@pytest.mark.parametrize("stop", [_ctrl_c, subprocess.Popen.terminate], ids=["ctrl-c", "sigterm"])
def test_up_stops_everything_and_exits_with_0(
    stop: Callable[[subprocess.Popen[str]], None], state_dir: Path, eventually: Eventually
) -> None:
    with _started("up", "--port", "0") as process:
        platform = _running(state_dir, eventually)
        assert platform.pid == process.pid
        wait_until_serving(platform.services["recommender"].grpc, DEADLINE_SECONDS)
        children = _children_of(process, PLATFORM_PROCESSES, eventually)
        assert process.stdout is not None
        assert process.stdout.readline() == "LLM-Pilot runs. Ctrl-C stops it.\n"
        stop(process)
        assert process.wait(DEADLINE_SECONDS) == 0
        output = process.stdout.read()
    assert _all_gone(children)
    assert StateDirectory(state_dir).announced() is None
    assert f"recommender: gRPC {platform.services['recommender'].grpc}" in output
    assert f"NATS: {platform.nats_url}" in output
    assert (
        f"{platform.services['recommender'].grpc}/llmpilot.recommendation.v1.RecommendationService/ListModels" in output
    )


@pytest.mark.parametrize(
    ("called_as", "program"),
    [
        (".venv/bin/llm-pilot", ".venv/bin/llm-pilot"),
        ("/my tools/llm-pilot", "'/my tools/llm-pilot'"),
        ("/site/llmpilot_console/__main__.py", f"{sys.executable} -m llmpilot_console"),
    ],
)
def test_up_prints_the_program_as_it_was_called(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, called_as: str, program: str
) -> None:
    monkeypatch.setattr(sys, "argv", [called_as, "up"])
    assert f"\n  LLMPILOT_HOME={tmp_path} {program} recommend --config " in describe(RUNNING, tmp_path)


def test_a_folder_with_a_space_is_quoted(tmp_path: Path) -> None:
    assert f"\n  LLMPILOT_HOME='{tmp_path}/my home' " in describe(RUNNING, tmp_path / "my home")


def test_up_names_its_folder_only_where_commands_would_not_find_it(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    assert "LLMPILOT_HOME=" not in describe(RUNNING, tmp_path / ".local" / "state" / "llm-pilot")


def test_up_prints_the_buf_beside_the_program(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(sys, "argv", [str(tmp_path / "llm-pilot"), "up"])
    assert "\n  buf curl --protocol grpc" in describe(RUNNING, tmp_path)
    (tmp_path / "buf").touch()
    assert f"\n  {tmp_path}/buf curl --protocol grpc" in describe(RUNNING, tmp_path)


@pytest.mark.skipif(sys.platform != "linux", reason="only Linux ends children with their parent")
def test_no_process_outlives_a_killed_supervisor(state_dir: Path, eventually: Eventually) -> None:
    with _started("up", "--port", "0") as process:
        _running(state_dir, eventually)
        children = _children_of(process, PLATFORM_PROCESSES, eventually)
        process.kill()
        assert _all_gone(children)


def test_a_killed_supervisor_does_not_keep_its_folder(state_dir: Path, eventually: Eventually) -> None:
    with _started("up", "--port", "0") as process:
        first = _running(state_dir, eventually)
        process.kill()
        process.wait()
    with _started("up", "--port", "0") as process:
        assert _running(state_dir, eventually).pid == process.pid != first.pid
        _ctrl_c(process)
        assert process.wait(DEADLINE_SECONDS) == 0


def _replace_service(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, source: str) -> None:
    (tmp_path / "first").mkdir()
    (tmp_path / "first" / "steady_service.py").write_text(source)
    monkeypatch.setenv("PYTHONPATH", f"{tmp_path / 'first'}{os.pathsep}{os.environ['PYTHONPATH']}")


def test_ctrl_c_while_starting_stops_everything(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, eventually: Eventually
) -> None:
    _replace_service(tmp_path, monkeypatch, "import signal; signal.pause()")
    with _started("up", "--port", "0") as process:
        children = _children_of(process, PLATFORM_PROCESSES, eventually)
        _ctrl_c(process)
        assert process.wait(DEADLINE_SECONDS) == 0
    assert _all_gone(children)


def test_a_second_ctrl_c_kills_what_the_first_could_not_end(
    tmp_path: Path, state_dir: Path, monkeypatch: pytest.MonkeyPatch, eventually: Eventually
) -> None:
    deaf = """
import signal
signal.signal(signal.SIGTERM, lambda *_: print("deaf to SIGTERM", flush=True))
print("started", flush=True)
while True:
    signal.pause()
"""
    _replace_service(tmp_path, monkeypatch, deaf)
    log = state_dir / "logs" / "recommender.log"
    with _started("up", "--port", "0") as process:
        eventually(lambda: log.exists() and "started" in log.read_text())
        children = _children_of(process, PLATFORM_PROCESSES, eventually)
        _ctrl_c(process)
        eventually(lambda: "deaf" in log.read_text())
        _ctrl_c(process)
        assert process.wait(Patience().stop_seconds / 2) == 0  # long before patience ends
    assert _all_gone(children)


def test_a_second_up_is_refused_and_says_where_the_first_runs(state_dir: Path, eventually: Eventually) -> None:
    with _started("up", "--port", "0") as process:
        platform = _running(state_dir, eventually)
        second = _finished("up", "--port", "0")
        assert second.returncode == 1
        assert f"process {process.pid}; " in second.stderr
        assert f"recommender at {platform.services['recommender'].grpc}" in second.stderr
        _ctrl_c(process)
        assert process.wait(DEADLINE_SECONDS) == 0


def test_a_taken_port_that_was_asked_for_is_an_error() -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        result = _finished("up", "--port", str(port))
    assert result.returncode == 2
    assert result.stderr == (
        f"error: the input is not valid\n  - --port: {port} is taken; choose another, or 0 for any free one\n"
    )


def test_a_taken_default_port_is_replaced_aloud(state_dir: Path, eventually: Eventually) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken, TemporaryFile("w+") as errors:
        port = taken.getsockname()[1]  # a port of this test's own stands in for 50051, which others may use
        script = f"from llmpilot_console import __main__, up; up.DEFAULT_PORT = {port}; __main__.main()"
        process = subprocess.Popen([sys.executable, "-c", script, "up"], stdout=subprocess.DEVNULL, stderr=errors)
        platform = _running(state_dir, eventually)
        eventually(lambda: os.fstat(errors.fileno()).st_size > 0)
        process.terminate()
        assert process.wait(DEADLINE_SECONDS) == 0
        errors.seek(0)
        assert errors.read() == f"port {port} is taken; the recommender uses a free one\nstopped\n"
    assert not platform.services["recommender"].grpc.endswith(f":{port}")


def test_ctrl_c_in_a_command_cancels_it_and_stops_what_it_started(eventually: Eventually) -> None:
    with TemporaryFile("w+") as errors:
        process = subprocess.Popen([*PILOT, "hold"], stdout=subprocess.PIPE, stderr=errors, text=True, process_group=0)
        assert process.stdout is not None
        address = process.stdout.readline().strip()  # the command has its service now
        wait_until_serving(address, DEADLINE_SECONDS)
        children = _children_of(process, COMMAND_PROCESSES, eventually)
        _ctrl_c(process)
        assert process.wait(DEADLINE_SECONDS) == 130
        process.stdout.close()
        errors.seek(0)
        assert errors.read().endswith("\ncancelled\n")
    assert _all_gone(children)


def _finished(*arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run([*PILOT, *arguments], capture_output=True, text=True, timeout=DEADLINE_SECONDS, check=False)
