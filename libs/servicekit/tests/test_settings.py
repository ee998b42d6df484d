from pathlib import Path

import pytest
from pydantic import Field

from llmpilot_contracts.errors import InvalidInputError, Violation
from llmpilot_servicekit.address import split_address
from llmpilot_servicekit.settings import ServiceSettings, load_settings


class OwnSettings(ServiceSettings):
    """What a service adds."""

    worker_count: int = Field(default=1, gt=0)
    names: tuple[str, ...] = ()
    model_dir: Path


def test_an_empty_environment_gives_the_defaults() -> None:
    settings = load_settings(ServiceSettings, {})
    assert settings.listen == "127.0.0.1:50051"
    assert settings.metrics_listen == "127.0.0.1:0"
    assert settings.nats_url == "nats://127.0.0.1:4222"
    assert settings.max_request_bytes == 4_194_304
    assert settings.address_file is None


def test_variables_are_read_and_unknown_ones_ignored() -> None:
    settings = load_settings(
        OwnSettings,
        {
            "LLMPILOT_LISTEN": "[::1]:0",
            "LLMPILOT_WORKER_COUNT": "3",
            "LLMPILOT_NAMES": '["a", "b"]',
            "LLMPILOT_MODEL_DIR": "/models",
            "LLMPILOT_SOMETHING": "else",
            "LISTEN": "nonsense",
        },
    )
    assert (settings.listen, settings.worker_count, settings.names) == ("[::1]:0", 3, ("a", "b"))


def test_the_environment_of_the_process_is_read_by_default(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LLMPILOT_LOG_LEVEL", "debug")
    assert load_settings(ServiceSettings).log_level == "debug"
    assert ServiceSettings().log_level == "debug"
    assert load_settings(ServiceSettings, {}).log_level == "info"


def test_an_empty_variable_counts_as_unset() -> None:
    assert load_settings(ServiceSettings, {"LLMPILOT_ADDRESS_FILE": ""}).address_file is None


def test_every_bad_variable_is_named_at_once() -> None:
    with pytest.raises(InvalidInputError) as caught:
        load_settings(
            OwnSettings,
            {
                "LLMPILOT_LISTEN": "localhost",
                "LLMPILOT_NATS_URL": "http://x:1",
                "LLMPILOT_SHUTDOWN_GRACE_SECONDS": "-1",
                "LLMPILOT_MAX_REQUEST_BYTES": "0",
                "LLMPILOT_DEFAULT_DEADLINE_SECONDS": "nan",
                "LLMPILOT_LOG_LEVEL": "loud",
                "LLMPILOT_WORKER_COUNT": "many",
                "LLMPILOT_NAMES": "a,b",
            },
        )
    assert {violation.field for violation in caught.value.violations} == {
        "LLMPILOT_LISTEN",
        "LLMPILOT_NATS_URL",
        "LLMPILOT_SHUTDOWN_GRACE_SECONDS",
        "LLMPILOT_MAX_REQUEST_BYTES",
        "LLMPILOT_DEFAULT_DEADLINE_SECONDS",
        "LLMPILOT_LOG_LEVEL",
        "LLMPILOT_WORKER_COUNT",
        "LLMPILOT_NAMES",
        "LLMPILOT_MODEL_DIR",
    }
    assert len(caught.value.violations) == 9
    assert Violation("LLMPILOT_MODEL_DIR", "must be set") in caught.value.violations
    assert "LLMPILOT_LISTEN: must be host:port" in str(caught.value)
    assert "is 'localhost'" in str(caught.value)
    assert "LLMPILOT_WORKER_COUNT: must be a valid integer" in str(caught.value)
    assert "LLMPILOT_LOG_LEVEL: must be 'debug', 'info', 'warning' or 'error', is 'loud'" in str(caught.value)


def test_settings_are_frozen() -> None:
    with pytest.raises(ValueError, match="frozen"):
        load_settings(ServiceSettings, {}).listen = "a:1"


@pytest.mark.parametrize("address", ["", ":1", "a", "a:", "a:-1", "a:65536", "a:x", "a:²", "http://a:1"])
def test_what_is_no_address_is_refused(address: str) -> None:
    with pytest.raises(ValueError, match="host:port"):
        split_address(address)


def test_an_address_is_split() -> None:
    assert split_address("localhost:0") == ("localhost", 0)
    assert split_address("[::1]:65535") == ("::1", 65_535)


@pytest.mark.parametrize("url", ["nats://x", "nats://:1", "nats://x:y", "x:4222", "nats://x:70000"])
def test_what_is_no_nats_url_is_refused(url: str) -> None:
    with pytest.raises(InvalidInputError, match="LLMPILOT_NATS_URL"):
        load_settings(ServiceSettings, {"LLMPILOT_NATS_URL": url})
