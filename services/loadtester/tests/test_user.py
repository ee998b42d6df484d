"""The user class in somebody's locustfile, run by the real Locust against the real simulator."""

import json
import os
import re
import signal
import socket
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from llmpilot_contracts.record_schema import STATUSES, problems
from llmpilot_loadtester.domain.records import RecordBatch
from llmpilot_loadtester.outputs.records_file import read_records

LIMIT_SECONDS = 60
COUNTED = ("--json-file", "out")

README = (Path(__file__).parents[1] / "README.md").read_text(encoding="utf-8")
CHAT = re.findall(r"```python\n(.*?)```", README, re.DOTALL)[0].replace('"max_tokens": 64', '"max_tokens": 8')
CURIOUS = """
import json
import gevent
from locust import events, task
from llmpilot_loadtester.engine.user import LlmUser

class Curious(LlmUser):
    protocol = "openai-completions"

    @task
    def ask(self):
        said = self.client.generate({"prompt": "Hello", "max_tokens": 5, "ignore_eos": True}, name="curious")
        print("SAID", json.dumps([said.status, said.output_tokens, said.ttft_seconds, said.itl_seconds, said.text]))
        gevent.sleep(60)

@events.request.add_listener
def listener_that_waits(**_):
    gevent.sleep(0.001)  # as those that write somewhere do
"""


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Where Locust runs: the locustfile of the README, with short replies, and one of our own."""
    (tmp_path / "chat.py").write_text(CHAT)
    (tmp_path / "curious.py").write_text(CURIOUS)
    return tmp_path


def command_of(file: str, url: str, *options: str) -> list[str]:
    return [sys.executable, "-m", "locust", "-f", file, "--headless", "--host", url, *options]


def run(folder: Path, *command: str, exit_code: int = 0) -> str:
    """Run Locust to its end; returns what it printed."""
    done = subprocess.run(
        command, cwd=folder, capture_output=True, text=True, timeout=LIMIT_SECONDS, check=False, env=os.environ
    )
    printed = done.stdout + done.stderr
    assert done.returncode == exit_code, printed
    return printed


def counts(folder: Path) -> dict[str, dict[str, Any]]:
    """What Locust counted in the end, by name."""
    lines = json.loads((folder / "out.json").read_text())
    return {line["name"]: line for line in lines}


def read(path: Path) -> RecordBatch:
    """The records of a file, which are valid."""
    file = read_records(path)
    assert len(file.stages) == 1
    records = file.records(file.stages[0])
    assert problems(records.table(origin="measured")) == []
    return records


def test_the_readmes_locustfile_shows_the_times_of_tokens(folder: Any, simulator: Any) -> None:
    options = ("-u", "8", "-r", "8", "-t", "3s", *COUNTED, "--llm-records", "records.parquet")
    run(folder, *command_of("chat.py", simulator.url, *options))
    records = read(folder / "records.parquet")
    lines = counts(folder)
    ok_count = int(records.is_ok.sum())
    assert ok_count >= 24
    # The server's times: 50 ms to the first token, then 10 ms a token.
    for name, least_ms in (("generate", 50 + 7 * 10), ("generate TTFT", 50), ("generate ITL", 5)):
        assert lines[name]["num_requests"] == ok_count
        assert lines[name]["num_failures"] == 0
        assert least_ms <= lines[name]["total_response_time"] / ok_count
        assert lines[name]["method"] == "openai-chat"
    assert lines["generate ITL"]["total_response_time"] / ok_count <= 20
    assert {STATUSES[code] for code in records.status.tolist()} <= {"ok", "cancelled"}
    assert set(records.user_index.tolist()) == set(range(8))
    assert records.request_index.tolist() == list(range(len(records)))


def test_a_locustfile_reads_what_came(folder: Any, simulator: Any) -> None:
    printed = run(folder, *command_of("curious.py", simulator.url, "-u", "1", "-t", "2s", *COUNTED))
    (said,) = re.findall(r"SAID \[\"ok\", 5, ([0-9.]+), ([0-9.]+), \"(.+)\"\]", printed)
    assert float(said[0]) >= 0.05
    assert 0 < float(said[1]) < 0.05
    assert "curious TTFT" in counts(folder)


def test_workers_records_reach_the_master_each_once(folder: Any, simulator: Any) -> None:
    with socket.create_server(("127.0.0.1", 0)) as listener:
        port = str(listener.getsockname()[1])
    options = ("-u", "6", "-r", "6", "-t", "2s", *COUNTED, "--llm-records", "all.parquet", "--master-bind-port", port)
    master = ("--master", "--expect-workers", "2")
    worker = [sys.executable, "-m", "locust", "-f", "chat.py", "--worker", "--master-port", port]
    with (
        subprocess.Popen(worker, cwd=folder, stderr=subprocess.DEVNULL) as first,
        subprocess.Popen(worker, cwd=folder, stderr=subprocess.DEVNULL) as second,
    ):
        try:
            run(folder, *command_of("chat.py", simulator.url, *options, *master))
        finally:
            for process in (first, second):
                process.send_signal(signal.SIGKILL)
    records = read(folder / "all.parquet")
    assert set(records.user_index.tolist()) == set(range(6))
    assert int(records.is_ok.sum()) == counts(folder)["generate"]["num_requests"]
    assert records.request_index.tolist() == list(range(len(records)))
    assert (records.send_nanos[1:] >= records.send_nanos[:-1]).all()


def test_failures_are_locusts_failures(folder: Any) -> None:
    with socket.create_server(("127.0.0.1", 0)) as listener:
        url = f"http://127.0.0.1:{listener.getsockname()[1]}"
    source = CHAT.replace("self.client", "import gevent; gevent.sleep(0.2); self.client")
    (folder / "failing.py").write_text(source)
    printed = run(folder, *command_of("failing.py", url, "-u", "1", "-t", "2s"), exit_code=1)
    assert "disconnected: 127.0.0.1" in printed
    assert "refuses connections" in printed


def test_a_host_that_is_no_url_is_told_to_the_user(folder: Any) -> None:
    printed = run(folder, *command_of("chat.py", "localhost", "-u", "1", "-t", "2s"), exit_code=1)
    assert "host: must begin with http:// or https://, is 'localhost'" in printed
