"""`llm-pilot simulate serve` as somebody types it."""

import re
import signal
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from urllib.request import Request, urlopen

import pytest
from click.testing import CliRunner

from llmpilot_contracts.errors import InvalidInputError
from llmpilot_simulator.cli_simulate import simulate

DEADLINE_SECONDS = 60
ANY_PORTS = ("--http", "127.0.0.1:0", "--grpc", "127.0.0.1:0")


@contextmanager
def served(*arguments: str) -> Iterator[tuple[subprocess.Popen[str], str, list[str]]]:
    """The process, the URL of its HTTP port, and what it printed until it was ready."""
    script = "from llmpilot_simulator.cli_simulate import simulate; simulate()"
    command = [sys.executable, "-u", "-c", script, "serve", *arguments, *ANY_PORTS]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True) as process:
        try:
            assert process.stdout is not None
            printed = []
            for line in process.stdout:
                printed.append(line)
                if found := re.search(r"http://[0-9.:]+", line):
                    yield process, found.group(), printed
                    break
            else:
                pytest.fail(f"ended before it listened: {printed}")
        finally:
            process.kill()


def test_a_reply_streams_and_ctrl_c_ends_the_server() -> None:
    with served("--llm", "llama-2-13b", "--gpu", "1xA100-40GB") as (process, url, printed):
        assert "meta-llama/Llama-2-13b on 1xA100-40GB, tgis, simulated\n" in printed
        body = b'{"model": "meta-llama/Llama-2-13b", "prompt": "hello", "max_tokens": 3, "stream": true}'
        request = Request(f"{url}/v1/completions", body, {"Content-Type": "application/json"})  # noqa: S310 http
        with urlopen(request, timeout=DEADLINE_SECONDS) as reply:  # noqa: S310 http
            assert reply.headers["x-llm-pilot-simulated"] == "true"
            assert reply.read().count(b"data: {") == 3
        process.send_signal(signal.SIGINT)
        assert process.wait(DEADLINE_SECONDS) == 0


def test_fixed_times_need_no_gpu() -> None:
    arguments = ("--llm", "llama-3.1-8b", "--fixed-ttft-ms", "50", "--fixed-itl-ms", "10")
    with served(*arguments) as (_, _, printed):
        assert "TTFT 50 ms, ITL 10 ms, whatever the load" in "".join(printed)


def test_every_wrong_option_is_told_at_once() -> None:
    arguments = (
        *("serve", "--llm", "llama-3.1-8b", "--fixed-ttft-ms", "50", "--fault", "explode=1", "--reject-share", "2"),
        *("--reject-status", "500", "--reply-tokens", "0", "--seed", "-1"),
    )
    with pytest.raises(InvalidInputError) as caught:
        CliRunner().invoke(simulate, arguments, catch_exceptions=False)
    fields = {violation.field for violation in caught.value.violations}
    assert {"x-simulate-fault", "median_tokens", "seed", "fixed_ttft_ms"} <= fields


def test_without_a_gpu_profile_or_fixed_times_it_says_what_to_name() -> None:
    with pytest.raises(InvalidInputError, match="gpu: is missing; name a profile"):
        CliRunner().invoke(simulate, ("serve", "--llm", "llama-3.1-8b"), catch_exceptions=False)
