import json
import os
from pathlib import Path

import psutil
import pytest

from llmpilot_console.local_platform import LocalPlatform
from llmpilot_console.state_directory import RunningPlatform, ServiceAddresses, StateDirectory
from llmpilot_console.supervisor import Supervisor, running_in_background
from llmpilot_contracts.errors import InvalidInputError, NotFoundError
from llmpilot_servicekit.client import wait_until_serving
from llmpilot_servicekit.neighbours import neighbour_address

pytestmark = pytest.mark.usefixtures("plugins")

DEADLINE_SECONDS = 30


def _local_platform(**variables: str) -> LocalPlatform:
    return LocalPlatform(environment={**os.environ, **variables})


def test_a_named_address_wins_over_everything() -> None:
    platform = _local_platform(LLMPILOT_RECOMMENDER_ADDRESS="gpu-box:50051")
    with platform.address_of("recommender") as address:
        assert address == "gpu-box:50051"
    assert psutil.Process().children() == []


@pytest.mark.parametrize("address", ["gpu-box", "http://gpu-box:50051", "gpu-box:70000"])
def test_a_named_address_that_is_none_is_refused(address: str) -> None:
    platform = _local_platform(LLMPILOT_RECOMMENDER_ADDRESS=address)
    with (
        pytest.raises(InvalidInputError, match=rf"^LLMPILOT_RECOMMENDER_ADDRESS: must be host:port .*'{address}'"),
        platform.address_of("recommender"),
    ):
        pass


def test_a_running_platform_is_used_and_left_running(state_dir: Path) -> None:
    with running_in_background(Supervisor(state_dir, {"recommender": "steady_service"})) as run:
        with _local_platform().address_of("recommender") as address:
            assert address == run.platform.services["recommender"].grpc
            assert len(psutil.Process().children()) == 2
        wait_until_serving(address, DEADLINE_SECONDS)


def test_without_a_platform_one_is_started_and_stopped(capsys: pytest.CaptureFixture[str]) -> None:
    with _local_platform().address_of("recommender") as address:
        wait_until_serving(address, DEADLINE_SECONDS)
    assert psutil.Process().children() == []
    output = capsys.readouterr()
    assert output.out == ""
    assert output.err.startswith("starting the recommender")


def test_a_started_platform_is_stopped_after_an_error() -> None:
    with pytest.raises(ZeroDivisionError), _local_platform().address_of("recommender"):
        raise ZeroDivisionError
    assert psutil.Process().children() == []


def test_a_note_of_a_platform_that_does_not_serve_is_ignored(state_dir: Path) -> None:
    state_dir.mkdir()
    gone = ServiceAddresses(grpc="127.0.0.1:1", metrics=None)  # nothing serves there; the process number was reused
    note = RunningPlatform(pid=os.getpid(), nats_url="nats://127.0.0.1:1", services={"recommender": gone})
    StateDirectory(state_dir).announce(note)
    with _local_platform().address_of("recommender") as address:
        assert address != gone.grpc
        wait_until_serving(address, DEADLINE_SECONDS)
    assert json.loads((state_dir / "platform.json").read_text())["services"]["recommender"]["grpc"] == gone.grpc


def test_a_service_that_nobody_installed_is_not_found() -> None:
    with (
        pytest.raises(NotFoundError, match=r"service 'autoscaler' not found; installed services: .*recommender"),
        _local_platform().address_of("autoscaler"),
    ):
        pass


def test_services_beside_the_one_are_started_where_it_can_find_them(capsys: pytest.CaptureFixture[str]) -> None:
    services = {"recommender": "steady_service", "workload-generator": "steady_service"}
    platform = LocalPlatform(environment=os.environ, find_services=lambda: services)
    with platform.address_of("recommender", beside=["workload-generator"]) as address:
        wait_until_serving(address, DEADLINE_SECONDS)
        environments = [process.environ() for process in psutil.Process().children()]
        (folder,) = {each["LLMPILOT_ADDRESS_FOLDER"] for each in environments if "LLMPILOT_ADDRESS_FOLDER" in each}
        assert neighbour_address(Path(folder), "recommender") == address
        beside = neighbour_address(Path(folder), "workload-generator")
        assert beside is not None
        wait_until_serving(beside, DEADLINE_SECONDS)
    assert psutil.Process().children() == []
    assert capsys.readouterr().err.startswith("starting the recommender and the workload-generator for this command")


def test_a_service_beside_that_a_variable_names_is_not_started() -> None:
    services = {"recommender": "steady_service", "workload-generator": "steady_service"}
    variables = {**os.environ, "LLMPILOT_WORKLOAD_GENERATOR_ADDRESS": "gpu-box:50051"}
    platform = LocalPlatform(environment=variables, find_services=lambda: services)
    with platform.address_of("recommender", beside=["workload-generator"]):
        assert len(psutil.Process().children()) == 2  # nats-server and the recommender
