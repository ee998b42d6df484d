import json
import logging
import subprocess
import sys

import pytest

from llmpilot_servicekit.logs import configure_logs, get_logger
from llmpilot_servicekit.settings import ServiceSettings


def test_off_a_terminal_each_line_is_a_json_object(capsys: pytest.CaptureFixture[str]) -> None:
    configure_logs(ServiceSettings())
    get_logger("a.module").info("model published", model="m-1", path=None)
    logging.getLogger("library").warning("slow %d", 3)
    captured = capsys.readouterr()
    own, foreign = map(json.loads, captured.err.splitlines())
    assert (own["event"], own["model"], own["level"], own["logger"]) == ("model published", "m-1", "info", "a.module")
    assert (foreign["event"], foreign["level"], foreign["logger"]) == ("slow 3", "warning", "library")
    assert own["timestamp"].endswith("Z")
    assert captured.out == ""


def test_a_traceback_stays_on_its_line(capsys: pytest.CaptureFixture[str]) -> None:
    configure_logs(ServiceSettings())
    try:
        raise ValueError("boom")
    except ValueError:
        get_logger("x").exception("failed")
    (line,) = capsys.readouterr().err.splitlines()
    assert "ValueError: boom" in json.loads(line)["exception"]


def test_console_is_readable(capsys: pytest.CaptureFixture[str]) -> None:
    configure_logs(ServiceSettings(log_format="console"))
    get_logger("x").info("model published")
    line = capsys.readouterr().err
    assert "model published" in line
    assert not line.startswith("{")


def test_what_is_below_the_level_is_dropped(capsys: pytest.CaptureFixture[str]) -> None:
    configure_logs(ServiceSettings(log_level="warning"))
    get_logger("x").info("quiet")
    logging.getLogger("y").info("quiet")
    assert capsys.readouterr().err == ""


def test_a_logger_made_before_the_configuration_follows_it(capsys: pytest.CaptureFixture[str]) -> None:
    log = get_logger("early")
    configure_logs(ServiceSettings())
    log.info("late")
    assert json.loads(capsys.readouterr().err)["event"] == "late"


def test_before_they_are_configured_only_warnings_are_shown_and_on_stderr() -> None:
    script = "from llmpilot_servicekit.logs import get_logger; log = get_logger('x'); log.info('a'); log.warning('b')"
    result = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, timeout=60, check=True)
    assert result.stdout == ""
    assert "b" in result.stderr
    assert "info" not in result.stderr
