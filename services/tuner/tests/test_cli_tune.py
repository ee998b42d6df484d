"""`llm-pilot tune` as somebody types it, as an init step runs it, and what its files are good for."""

import asyncio
import json
import os
import re
import runpy
import shutil
import signal
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import psutil
import pytest
from click.testing import CliRunner, Result

from llmpilot.tuning.v1 import tuning_pb2 as pb
from llmpilot_console.cli import pilot
from llmpilot_contracts.subjects import TUNING_COMPLETED, TUNING_RESULTS
from llmpilot_servicekit.nats_connection import NatsConnection
from llmpilot_servicekit.nats_server import start_nats_server
from llmpilot_tuner.outputs.report import read_report

DEADLINE_SECONDS = 60
TINY_LLMS: dict[str, str] = runpy.run_path(str(Path(__file__).with_name("tiny_llms.py")))["TINY_LLMS"]
LLAMA = ("--config", "llama-3.1-8b", "--gpu", "1xA100-40GB", "--max-requests", "32")
ENDLESS = ("--probe", "cpu", "--gpu-memory", "60MB", "--longest-sequence", "32", "--max-requests", "4")
"""Its final verdict would take hours."""


def tune(*arguments: str) -> Result:
    return CliRunner().invoke(pilot, ["tune", *arguments])


@contextmanager
def started(*arguments: str, script: str = "") -> Iterator[subprocess.Popen[str]]:
    """`llm-pilot tune` as a process of its own, ended at the end."""
    command = ["-c", script, "tune"] if script else ["-m", "llmpilot_console", "tune"]
    process = subprocess.Popen(
        [sys.executable, *command, *arguments],
        env=os.environ | {"OMP_NUM_THREADS": "1"},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    try:
        yield process
    finally:
        with suppress(ProcessLookupError):
            process.kill()
        process.communicate(timeout=DEADLINE_SECONDS)


def variables_of(file: Path) -> dict[str, str]:
    """What a shell that reads the file has."""
    command = ["sh", "-c", f"set -a; . '{file}'; exec env -0"]
    told = subprocess.run(command, env={}, capture_output=True, check=True, timeout=DEADLINE_SECONDS).stdout.decode()
    return dict(line.split("=", 1) for line in told.split("\0") if line)


def test_one_number_is_in_every_file(tmp_path: Path) -> None:
    names = {"--report": "r.json", "--html": "r.html", "--env-file": "server.env", "--result-file": "weight"}
    files = {option: tmp_path / name for option, name in names.items()}
    result = tune(*LLAMA, *(str(part) for pair in files.items() for part in pair))
    assert result.exit_code == 0, result.output
    weight = int(files["--result-file"].read_text())
    report = read_report(files["--report"].read_bytes())
    assert report.max_batch_weight == weight
    assert f"{weight:,}" in files["--html"].read_text()
    assert variables_of(files["--env-file"])["MAX_BATCH_WEIGHT"] == str(weight)
    assert f"{weight:,} tokens" in result.stdout
    assert {path.name for path in tmp_path.iterdir()} == set(names.values())


def test_what_was_predicted_is_not_called_measured() -> None:
    result = tune(*LLAMA)
    assert "predicted by formulas, not measured" in result.stdout
    assert f"{len(re.findall('^weight ', result.stderr, re.MULTILINE))}, plain binary search" in result.stdout


def test_the_same_command_has_its_answer_at_once_and_another_one_has_not(tmp_path: Path) -> None:
    first = tune(*LLAMA, "--cache", str(tmp_path / "kept"))
    second = tune(*LLAMA, "--cache", str(tmp_path / "kept"))
    other = tune(*LLAMA, "--cache", str(tmp_path / "kept"), "--granule", "64")
    assert "found before" not in first.stderr
    assert "found before" in second.stderr
    assert second.stdout == first.stdout
    assert "found before" not in other.stderr


def test_a_tuning_goes_on_after_the_probes_that_were_kept(tmp_path: Path) -> None:
    """As if it had been killed before the last event came."""
    first = tune(*LLAMA, "--cache", str(tmp_path))
    (file,) = tmp_path.iterdir()
    kept = json.loads(file.read_text())
    file.write_text(json.dumps(kept | {"result": None, "probes": kept["probes"][:1]}))
    second = tune(*LLAMA, "--cache", str(tmp_path))
    assert "going on after 1 kept probes" in second.stderr
    assert len(re.findall("^weight ", second.stderr, re.MULTILINE)) == len(kept["probes"]) - 1
    assert second.stdout.splitlines()[0] == first.stdout.splitlines()[0]


@pytest.mark.parametrize("content", ["{", '{"version": 0}', json.dumps({"version": 1, "key": "of another machine"})])
def test_what_was_kept_elsewhere_or_is_broken_does_not_count(content: str, tmp_path: Path) -> None:
    tune(*LLAMA, "--cache", str(tmp_path))
    (file,) = tmp_path.iterdir()
    file.write_text(content)
    result = tune(*LLAMA, "--cache", str(tmp_path))
    assert result.exit_code == 0
    assert "found before" not in result.stderr
    assert json.loads(file.read_text())["result"]["max_batch_weight"]


WRONG: dict[str, tuple[tuple[str, ...], int, str]] = {
    "no such config": (("--config", "nowhere/config.json", "--gpu-memory", "24GiB"), 1, "not found"),
    "no LLM": (("--gpu-memory", "24GiB"), 2, "--config: is needed"),
    "no memory": (("--config", "llama-3.1-8b"), 2, "--gpu-memory: is needed"),
    "zero memory": (("--config", "llama-3.1-8b", "--gpu-memory", "0GiB"), 2, "--gpu-memory: must be > 0"),
    "a wrong unit": (("--config", "llama-3.1-8b", "--gpu-memory", "24"), 2, "write 24GiB"),
    "all is set aside": (
        ("--config", "llama-3.1-8b", "--gpu-memory", "20GB", "--reserve", "20GB"),
        2,
        "--reserve: must be >= 0 and less",
    ),
    "limits that contradict each other": (
        (*LLAMA, "--longest-sequence", "10", "--max-new-tokens", "10"),
        2,
        "--max-new-tokens: must be < --longest-sequence 10",
    ),
    "an LLM larger than its GPU": (
        ("--config", "llama-3.1-70b", "--gpu-memory", "24GiB"),
        1,
        "108.30 GiB too little; the smallest tensor parallelism that fits is 8 such GPUs",
    ),
    "no room for one request": (
        ("--config", "llama-3.1-8b", "--gpu-memory", "15.9GiB"),
        1,
        "lower --longest-sequence",
    ),
    "a file that is a folder": ((*LLAMA, "--report", "/"), 2, "--report: / is a folder"),
    "a file in no folder": ((*LLAMA, "--html", "/nonexistent/r.html"), 2, "--html: /nonexistent is no folder"),
    "one file for two": ((*LLAMA, "--html", "one", "--report", "one"), 2, "is the file of"),
    "a cache that is no folder": ((*LLAMA, "--cache", "/dev/null"), 1, "cannot be made a folder"),
    "a server nobody knows": ((*LLAMA, "--server", "triton"), 2, "triton"),
    "no server to probe": ((*LLAMA, "--probe", "server"), 2, "--url: is needed"),
    "a server that is not there": (
        (*LLAMA, "--probe", "server", "--url", "grpc://127.0.0.1:1"),
        1,
        "no healthy tgis server answers at grpc://127.0.0.1:1",
    ),
    "a server of another kind": (
        (*LLAMA, "--probe", "server", "--url", "http://127.0.0.1:1"),
        2,
        "--url: must be grpc://",
    ),
    "a command that is not there": (
        (*LLAMA, "--probe", "server", "--url", "grpc://127.0.0.1:1", "--start", "no-such-program {weight}"),
        1,
        "cannot be run: no-such-program",
    ),
    "a command with a wrong name in it": (
        (*LLAMA, "--probe", "server", "--url", "grpc://127.0.0.1:1", "--start", "serve {wieght}"),
        2,
        "--start: '{wieght}' cannot be filled in",
    ),
    "more requests than are looked at": ((*LLAMA[:4], "--max-requests", "100000000"), 2, "--max-requests: must be <="),
}


@pytest.mark.parametrize("case", WRONG)
def test_what_is_wrong_is_one_clear_error(case: str) -> None:
    arguments, status, said = WRONG[case]
    result = tune(*arguments)
    assert (result.exit_code, result.stdout) == (status, "")
    assert said in result.stderr
    assert "Traceback" not in result.stderr


def test_without_pytorch_the_error_says_what_to_do_and_formulas_still_work() -> None:
    script = "import sys; sys.modules['torch'] = None; from llmpilot_console.__main__ import main; main()"
    with started(*LLAMA, "--probe", "dry", script=script) as process:
        told, complaints = process.communicate(timeout=DEADLINE_SECONDS)
        assert (process.returncode, told) == (1, "")
        assert "llm-pilot-tuner[torch]" in complaints
        assert "--probe analytic" in complaints
    with started(*LLAMA, script=script) as process:
        process.communicate(timeout=DEADLINE_SECONDS)
        assert process.returncode == 0


def test_an_architecture_that_pytorch_cannot_build_is_said_so(tmp_path: Path) -> None:
    """The formulas know it by its sizes; a probe that runs it needs its code."""
    pytest.importorskip("torch", reason="the worker runs the LLM with PyTorch")
    config = json.loads(TINY_LLMS["llama-gqa"]) | {"model_type": "llama-of-mars", "architectures": ["MarsForCausalLM"]}
    (tmp_path / "config.json").write_text(json.dumps(config))
    result = tune("--config", str(tmp_path), "--gpu-memory", "1GB", "--probe", "dry")
    assert result.exit_code == 2
    assert "does not build a 'llama-of-mars'" in result.stderr
    assert "Traceback" not in result.stderr


def in_final_verdict(process: subprocess.Popen[str]) -> list[str]:
    """What was told until the final verdict began."""
    assert process.stderr is not None
    lines = []
    for line in process.stderr:
        lines.append(line)
        if line.startswith("final verdict"):
            return lines
    pytest.fail(f"ended before: {lines}")


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_ctrl_c_leaves_no_worker_and_keeps_the_probes(number: signal.Signals, tmp_path: Path) -> None:
    pytest.importorskip("torch", reason="the worker runs the LLM with PyTorch")
    (tmp_path / "config.json").write_text(TINY_LLMS["llama-gqa"])
    kept = tmp_path / "kept"
    arguments = ("--config", str(tmp_path), *ENDLESS, "--cache", str(kept), "--env-file", str(tmp_path / "server.env"))
    with started(*arguments, "--soak-steps", "100000") as process:
        lines = in_final_verdict(process)
        workers = psutil.Process(process.pid).children(recursive=True)
        assert workers
        process.send_signal(number)
        told, complaints = process.communicate(timeout=DEADLINE_SECONDS)
    assert process.returncode == 130
    probe_count = sum(line.startswith("weight ") for line in lines)
    assert re.search(f"{probe_count} probes? kept in {re.escape(str(kept))}", complaints)
    assert "the same command goes on from there" in complaints
    assert told == ""
    assert "Traceback" not in complaints
    _, alive = psutil.wait_procs(workers, timeout=10)
    assert alive == []
    assert not (tmp_path / "server.env").exists()


@pytest.fixture(scope="module")
def nats_url(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """The URL of a real nats-server."""
    with start_nats_server(tmp_path_factory.mktemp("nats")) as server:
        yield server.url


async def last_event(url: str) -> pb.TuningCompleted:
    """The last message of the stream of results."""
    connection = NatsConnection(url, streams=(TUNING_RESULTS,))
    async with asyncio.TaskGroup() as group:
        running = group.create_task(connection.run())
        await connection.wait_connected()
        found = await connection.last(TUNING_COMPLETED)
        running.cancel()
    assert found is not None
    event: Any = found[0]
    assert isinstance(event, pb.TuningCompleted)
    return event


def test_the_event_on_nats_has_the_number_of_the_file(nats_url: str, tmp_path: Path) -> None:
    result = tune(*LLAMA, "--nats", nats_url, "--result-file", str(tmp_path / "weight"))
    assert result.exit_code == 0, result.output
    event = asyncio.run(last_event(nats_url))
    weight = int((tmp_path / "weight").read_text())
    assert event.tuning.max_batch_weight == weight
    assert read_report(event.tuning.report_json).max_batch_weight == weight
    assert event.tuning.state == pb.STATE_SUCCEEDED
    assert not event.tuning.measured
    assert event.tuning.name in result.stderr


def test_without_nats_the_result_stands_and_the_warning_says_so(tmp_path: Path) -> None:
    result = tune(*LLAMA, "--nats", "nats://127.0.0.1:1", "--result-file", str(tmp_path / "weight"))
    assert result.exit_code == 0
    assert "warning: the event was not sent" in result.stderr
    assert int((tmp_path / "weight").read_text()) > 0


def test_a_terminal_is_shown_a_bar_and_the_same_lines(tmp_path: Path) -> None:
    """`script` gives the command a terminal."""
    command = f"{sys.executable} -m llmpilot_console tune {' '.join(LLAMA)}"
    script = shutil.which("script") or pytest.skip("there is no `script`")
    told = subprocess.run(
        [script, "-qec", command, str(tmp_path / "typescript")],
        env=os.environ | {"TERM": "xterm", "COLUMNS": "120"},
        capture_output=True,
        text=True,
        check=True,
        timeout=DEADLINE_SECONDS,
    ).stdout
    assert "predicted root" in told
    assert "maximum batch weight" in told
