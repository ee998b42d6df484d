import os
import subprocess
import sys
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from llmpilot_console.state_directory import RunningPlatform, ServiceAddresses, StateDirectory, default_state_path
from llmpilot_contracts.errors import PreconditionError


def _platform(pid: int) -> RunningPlatform:
    addresses = ServiceAddresses(grpc="127.0.0.1:50051", metrics="127.0.0.1:9000")
    return RunningPlatform(pid=pid, nats_url="nats://127.0.0.1:4222", services={"recommender": addresses})


def test_llmpilot_home_wins() -> None:
    assert default_state_path({"LLMPILOT_HOME": "/srv/pilot", "XDG_STATE_HOME": "/srv/xdg"}) == Path("/srv/pilot")


def test_xdg_state_home_is_the_default() -> None:
    assert default_state_path({"XDG_STATE_HOME": "/srv/xdg"}) == Path("/srv/xdg/llm-pilot")


def test_without_variables_the_home_folder_is_used() -> None:
    assert default_state_path({}) == Path.home() / ".local" / "state" / "llm-pilot"


addresses = st.text(min_size=1)


@given(
    nats_url=addresses,
    services=st.dictionaries(
        addresses, st.builds(ServiceAddresses, grpc=addresses, metrics=st.none() | addresses), max_size=3
    ),
)
def test_an_announced_platform_is_found_again(
    tmp_path_factory: pytest.TempPathFactory, nats_url: str, services: dict[str, ServiceAddresses]
) -> None:
    state = StateDirectory(tmp_path_factory.getbasetemp())
    platform = RunningPlatform(pid=os.getpid(), nats_url=nats_url, services=services)
    state.announce(platform)
    assert state.announced() == platform


def test_a_platform_whose_process_has_ended_is_not_announced(tmp_path: Path) -> None:
    ended = subprocess.Popen([sys.executable, "-ISc", ""])
    ended.wait()
    state = StateDirectory(tmp_path)
    state.announce(_platform(ended.pid))
    assert state.announced() is None


HUGE = '{"pid": 1' + 30 * "0" + ', "nats_url": "", "services": {}}'


@pytest.mark.parametrize(
    "note", ["", "{", "[]", "null", "{}", '{"pid": "x"}', '{"pid": 1, "nats_url": "", "services": 3}', HUGE]
)
def test_a_damaged_note_announces_nothing(tmp_path: Path, note: str) -> None:
    (tmp_path / "platform.json").write_text(note)
    assert StateDirectory(tmp_path).announced() is None


def test_a_withdrawn_platform_is_not_announced(tmp_path: Path) -> None:
    state = StateDirectory(tmp_path)
    state.announce(_platform(os.getpid()))
    state.withdraw()
    assert state.announced() is None


def test_a_second_lock_is_refused_and_says_where_the_first_runs(tmp_path: Path) -> None:
    state = StateDirectory(tmp_path)
    with state.lock():
        state.announce(_platform(os.getpid()))
        with pytest.raises(PreconditionError, match=rf"process {os.getpid()}; recommender at 127\.0\.0\.1:50051"):
            StateDirectory(tmp_path).lock().__enter__()


def test_a_lock_can_be_taken_again_after_its_end(tmp_path: Path) -> None:
    with StateDirectory(tmp_path).lock():
        pass
    with StateDirectory(tmp_path).lock():
        pass


@pytest.mark.parametrize("folder", [".", "logs", "nats"])
def test_a_state_directory_that_cannot_be_written_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, folder: str
) -> None:
    def access(path: Path, _mode: int) -> bool:  # root, who may run this, may write anywhere
        return path != tmp_path / folder

    monkeypatch.setattr(os, "access", access)
    with pytest.raises(PreconditionError, match=r"cannot write to .* \(Permission denied\); name another"):
        StateDirectory(tmp_path).lock().__enter__()


def test_a_lock_file_that_cannot_be_opened_is_refused(tmp_path: Path) -> None:
    (tmp_path / "lock").mkdir()
    with pytest.raises(PreconditionError, match="--state-dir"):
        StateDirectory(tmp_path).lock().__enter__()


def test_a_state_directory_that_cannot_be_made_is_refused(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(PreconditionError, match="--state-dir"):
        StateDirectory(tmp_path / "file" / "state").lock().__enter__()
