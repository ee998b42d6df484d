"""A load test in ten lines of Python, as the README shows it: real processes, a simulated LLM."""

import os
import re
import subprocess
import sys
import sysconfig
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

TIMEOUT_SECONDS = 60
PROGRAM = str(Path(sysconfig.get_path("scripts")) / "llm-pilot")
LLM = "meta-llama/Llama-3.1-8B"
TTFT_SECONDS, ITL_SECONDS = 0.005, 0.001

README = Path(__file__).parents[1] / "README.md"


def load_test() -> str:
    """The Python program that the README shows."""
    (program,) = re.findall(r"```python\n(.*?)```", README.read_text(encoding="utf-8"), re.DOTALL)
    return str(program)


@pytest.fixture
def simulator(tmp_path: Path) -> Iterator[str]:
    """The address of a simulated LLM whose tokens leave at known times."""
    address = ("--http", "127.0.0.1:0", "--grpc", "127.0.0.1:0")
    times = ("--fixed-ttft-ms", str(1000 * TTFT_SECONDS), "--fixed-itl-ms", str(1000 * ITL_SECONDS))
    command = [PROGRAM, "simulate", "serve", "--llm", LLM, "--gpu", "1xA100-40GB", *times, *address]
    with (tmp_path / "log").open("wb") as log:
        process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=log, text=True)
    try:
        assert process.stdout is not None
        found = None
        while found is None:
            line = process.stdout.readline()
            assert line, (tmp_path / "log").read_text()
            found = re.search(r"OpenAI and TGI at (http://\S+),", line)
        yield found[1]
    finally:
        process.terminate()
        process.communicate(timeout=TIMEOUT_SECONDS)


def test_ten_lines_of_python_are_a_load_test(start_service: Callable[..., Any], simulator: str) -> None:
    """A reply of n tokens takes 5 + (n - 1) ms; production's median is 11 tokens, its 99th percentile 100 or more."""
    with start_service(LLMPILOT_NATS_URL="nats://127.0.0.1:1") as service:
        arguments = [service.grpc_address, simulator, f"{LLM}-simulated"]
        environment = {name: value for name, value in os.environ.items() if not name.lower().endswith("_proxy")}
        ended = subprocess.run(
            [sys.executable, "-c", load_test(), *arguments],
            env=environment,
            capture_output=True,
            text=True,
            timeout=TIMEOUT_SECONDS,
            check=False,
        )
    assert ended.returncode == 0, ended.stderr
    found = re.fullmatch(r"300 requests of 16 users: median (\S+) s, 99 % within (\S+) s\n", ended.stdout)
    assert found, ended.stdout
    median_seconds, last_seconds = map(float, found.groups())
    assert TTFT_SECONDS + 8 * ITL_SECONDS < median_seconds < last_seconds
    assert last_seconds > TTFT_SECONDS + 90 * ITL_SECONDS
