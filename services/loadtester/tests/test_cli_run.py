import os
import re
import signal
import subprocess
import sys
import urllib.request
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest

DEADLINE_SECONDS = 60
SHORT = ("--input-tokens", "20", "--output-tokens", "10", "--warm-up", "0.1s", "--workers", "1")
LONG = (*SHORT, "--users", "2", "--duration", "10m", "--prometheus", "127.0.0.1:0")

Eventually = Callable[[Callable[[], bool]], None]


@contextmanager
def started(folder: Path, target: str, *arguments: str) -> Iterator[subprocess.Popen[str]]:
    """`llm-pilot loadtest run` in a folder, as a process of its own; it is ended at the end."""
    inherited = {name: value for name, value in os.environ.items() if not name.startswith("LLMPILOT_")}
    (folder / "temporary").mkdir(exist_ok=True)
    process = subprocess.Popen(
        [sys.executable, "-m", "llmpilot_console", "loadtest", "run", "--target", target, "--out", "made", *arguments],
        env=inherited | {"LLMPILOT_HOME": str(folder / "home"), "TMPDIR": str(folder / "temporary")},
        cwd=folder,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    try:
        yield process
    finally:
        if process.poll() is None:
            process.send_signal(signal.SIGTERM)
            process.send_signal(signal.SIGINT)
        process.communicate(timeout=DEADLINE_SECONDS)


def ended(process: subprocess.Popen[str]) -> tuple[int, str, str]:
    """Wait for the exit status, and give it with stdout and stderr."""
    told, complaints = process.communicate(timeout=DEADLINE_SECONDS)
    return process.returncode, told, complaints


def run(folder: Path, target: str, *arguments: str) -> tuple[int, str, str]:
    with started(folder, target, *arguments) as process:
        return ended(process)


def status_of(told: str) -> int:
    """The exit status that goes with what was told: on a busy machine the numbers may not count, and it says so."""
    assert ("numbers valid" in told) != ("not valid because" in told), told
    return 0 if "numbers valid" in told else 3


def metrics_of(process: subprocess.Popen[str]) -> str:
    """Scrape the address that the command says on stderr, and go on reading it."""
    assert process.stderr is not None
    found = (re.search(r"http://\S+/metrics", line) for line in process.stderr)
    return next(match[0] for match in found if match)


def scraped(address: str, name: str) -> float:
    """The sum of a metric's series."""
    with urllib.request.urlopen(address, timeout=DEADLINE_SECONDS) as answer:  # noqa: S310 http, of this machine
        lines = answer.read().decode().splitlines()
    return sum(float(line.rpartition(" ")[2]) for line in lines if line.startswith(f"{name}{{"))


def test_a_load_test_gives_its_files(tmp_path: Path, simulator_url: str) -> None:
    """The simulator's first token comes after 20 ms, the other 9 every 2 ms; both times end late, never early."""
    status, told, _ = run(tmp_path, simulator_url, *SHORT, "--users", "1,2", "--duration", "0.5s")
    assert status == status_of(told)
    names = {"records.parquet", "report.html", "stages.csv"}
    names |= {f"stage-0{stage}{suffix}" for stage in (0, 1) for suffix in (".vllm.json", ".llm-d.yaml")}
    assert {path.name for path in (tmp_path / "made").iterdir()} == names
    assert "simulated numbers" in told
    table = pq.read_table(tmp_path / "made" / "records.parquet")
    ok = table.filter([status == "ok" for status in table["status"].to_pylist()])
    chunks = np.array(ok["chunk_time_nanos"].to_pylist())
    sent = np.array(ok["send_time_nanos"].to_pylist())
    assert chunks.shape == (len(ok), 10)
    assert (chunks[:, 0] - sent).min() >= 20e6
    assert (chunks[:, 9] - sent).min() >= (20 + 9 * 2) * 1e6
    assert set(table["origin"].to_pylist()) == {"simulated"}


def test_the_live_metrics_are_served_and_ctrl_c_keeps_what_was_measured(
    tmp_path: Path, simulator_url: str, eventually: Eventually
) -> None:
    with started(tmp_path, simulator_url, *LONG) as process:
        address = metrics_of(process)
        eventually(lambda: scraped(address, "llmpilot_loadtest_output_tokens_total") >= 50)
        assert scraped(address, "llmpilot_loadtest_users") == 2
        seen_count = scraped(address, "llmpilot_loadtest_requests_total")
        process.send_signal(signal.SIGINT)
        status, told, complaints = ended(process)
    assert status == 1
    assert "cancelling, what was measured is kept" in complaints
    assert "the load test was cancelled" in complaints
    assert "numbers valid" not in told
    assert len(pq.read_table(tmp_path / "made" / "records.parquet")) >= seen_count


def test_a_second_signal_ends_at_once_and_keeps_what_was_measured(
    tmp_path: Path, simulator_url: str, eventually: Eventually
) -> None:
    with started(tmp_path, simulator_url, *LONG) as process:
        address = metrics_of(process)
        eventually(lambda: scraped(address, "llmpilot_loadtest_output_tokens_total") >= 50)
        process.send_signal(signal.SIGTERM)
        assert process.stderr is not None
        next(line for line in process.stderr if "cancelling" in line)
        process.send_signal(signal.SIGTERM)
        status, _, _ = ended(process)
    assert status in {1, 130}  # it may have been cancelled before the second one came
    assert len(pq.read_table(tmp_path / "made" / "records.parquet")) >= 5


def test_records_that_cannot_be_written_there_are_elsewhere(
    tmp_path: Path, simulator_url: str, eventually: Eventually
) -> None:
    folder = tmp_path / "made"
    with started(tmp_path, simulator_url, *SHORT, "--users", "1", "--duration", "0.5s") as process:
        eventually(folder.exists)
        folder.rmdir()
        folder.touch()
        status, _, complaints = ended(process)
    assert status == 1
    (told,) = re.findall(r"the records are in (\S+):", complaints)
    assert Path(told).is_relative_to(tmp_path / "temporary")
    assert len(pq.read_table(told)) > 0


def test_headers_reach_the_server_and_failures_do_not_count(tmp_path: Path, simulator_url: str) -> None:
    arguments = ("--users", "1", "--warm-up", "0", "--duration", "0.3s", "--header", "x-simulate-fault=reject=503")
    status, told, complaints = run(tmp_path, simulator_url, *SHORT, *arguments)
    assert status == 3, told + complaints
    assert "requests succeeded, so there are no latencies" in told
    assert "numbers valid" not in told
    assert "ok" not in set(pq.read_table(tmp_path / "made" / "records.parquet")["status"].to_pylist())


def test_prompts_of_a_file_reach_the_server(tmp_path: Path, simulator_url: str) -> None:
    (tmp_path / "prompts.jsonl").write_text('{"prompt": "Why is the sky blue?", "output_tokens": 3}\n')
    arguments = ("--prompts", "prompts.jsonl", "--users", "1", "--warm-up", "0", "--duration", "0.3s")
    status, told, _ = run(tmp_path, simulator_url, *arguments, "--format", "csv")
    assert status == status_of(told)
    table = pq.read_table(tmp_path / "made" / "records.parquet")
    assert set(table.filter(np.array(table["status"].to_pylist()) == "ok")["output_token_count"].to_pylist()) == {3}
    assert {path.name for path in (tmp_path / "made").iterdir()} == {"records.parquet", "stages.csv"}


@pytest.mark.parametrize(
    ("target", "arguments", "expected_status", "told"),
    [
        ("http://127.0.0.1:1", (), 1, "error: 127.0.0.1:1 refuses connections: does the server run there?"),
        ("http://127.0.0.1:1", ("--workers", "-1"), 2, "  - --workers: must be >= 0, is -1"),
        ("http://127.0.0.1:1", ("--name", "A B"), 2, "  - --name: must be 1 to 63 lower-case letters"),
        ("http://127.0.0.1:1", ("--prometheus", "x"), 1, "error: --prometheus: cannot listen on x"),
    ],
)
def test_what_cannot_be_run_leaves_no_folder(
    tmp_path: Path, target: str, arguments: tuple[str, ...], expected_status: int, told: str
) -> None:
    status, _, complaints = run(tmp_path, target, *SHORT, "--users", "1", "--duration", "1s", *arguments)
    assert status == expected_status, complaints
    assert told in complaints
    assert not (tmp_path / "made").exists()
