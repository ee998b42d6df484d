import pytest

from llmpilot_contracts.errors import InvalidInputError
from llmpilot_perfmodel.batching.policies import TgisPolicy
from llmpilot_perfmodel.steps.step_time import StepConstants
from llmpilot_simulator.settings import FixedTimes, ModelledTimes, SimulatorSettings

FIXED = FixedTimes(ttft_seconds=0.1, itl_seconds=0.01)


def test_everything_wrong_with_the_settings_is_said_at_once() -> None:
    with pytest.raises(InvalidInputError) as caught:
        SimulatorSettings(
            model_id="",
            context_length=1,
            times=FixedTimes(ttft_seconds=-1, itl_seconds=float("nan")),
            http_address="nowhere",
            grpc_address="127.0.0.1:99999",
            slow_reader_seconds=-1,
            shutdown_grace_seconds=float("inf"),
        )

    assert sorted(violation.field for violation in caught.value.violations) == [
        "context_length",
        "grpc_address",
        "http_address",
        "itl_seconds",
        "model_id",
        "shutdown_grace_seconds",
        "slow_reader_seconds",
        "ttft_seconds",
    ]


def test_a_negative_frontend_time_is_refused() -> None:
    constants = StepConstants(
        decode_seconds=0.01,
        decode_seconds_per_sequence=0,
        decode_seconds_per_cached_token=0,
        prefill_seconds=0.01,
        prefill_seconds_per_token=0,
        prefill_seconds_per_request=0,
    )
    times = ModelledTimes(
        policy=TgisPolicy(max_batch_weight=1000), tables=constants.tables(), frontend_seconds_per_token=-1
    )

    with pytest.raises(InvalidInputError, match="frontend_seconds_per_token: must be from 0 to 1e\\+06, is -1"):
        SimulatorSettings(model_id="a", context_length=100, times=times)


def test_grpc_need_not_be_served() -> None:
    assert SimulatorSettings(model_id="a", context_length=100, times=FIXED, grpc_address=None).grpc_address is None
