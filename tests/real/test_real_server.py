"""The load tester against a server that nobody here wrote: `LLMPILOT_REAL_SERVER=http://HOST:PORT make test-real`.

Any server with OpenAI completions will do: vLLM, transformers serve, llama.cpp's. LLMPILOT_REAL_MODEL names the model
where the server lists none. What is expected comes from a few requests that this file sends by itself.
"""

import csv
import http.client
import json
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from urllib.parse import urlsplit

import pyarrow.parquet as pq
import pytest

USERS_COUNTS = (1, 2, 4)
OUTPUT_TOKENS = 24
PROMPTS = tuple(f"{number} The quick brown fox jumps over the lazy dog, and then" for number in range(16))
LOAD_TEST_SECONDS = 200
REQUEST_SECONDS = 60
TOLERANCE = 3.0
"""A server on a busy CPU is not twice the same; a wrong definition of a metric is off by the number of tokens."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Server:
    """The server under test."""

    url: str
    model: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Own:
    """What this file measures by itself, one request after the other."""

    ttft_ms: float
    gap_ms: float


@dataclass(frozen=True, slots=True, kw_only=True)
class Outcome:
    """What the load tester left."""

    exit_code: int
    output: str
    records: list[dict[str, object]]
    stages: list[dict[str, str]]


@pytest.fixture(scope="module")
def server() -> Server:
    url = os.environ.get("LLMPILOT_REAL_SERVER", "")
    if not url:
        pytest.skip("no real server: set LLMPILOT_REAL_SERVER=http://HOST:PORT")
    model = os.environ.get("LLMPILOT_REAL_MODEL", "")
    if not model:
        with _answer(url, "GET", "/v1/models") as response:
            model = json.loads(response.read())["data"][0]["id"]
    return Server(url=url, model=model)


@pytest.fixture(scope="module")
def own(server: Server) -> Own:
    measured = [_measure(server, prompt) for prompt in PROMPTS[:5]][1:]  # the first may load the model
    return Own(
        ttft_ms=statistics.median(stamps[0] for stamps in measured),
        gap_ms=statistics.median((stamps[-1] - stamps[0]) / (len(stamps) - 1) for stamps in measured),
    )


@pytest.fixture(scope="module")
def outcome(server: Server, own: Own, tmp_path_factory: pytest.TempPathFactory) -> Outcome:  # noqa: ARG001 goes first
    folder = tmp_path_factory.mktemp("real")
    prompts = folder / "prompts.jsonl"
    prompts.write_text("".join(json.dumps({"prompt": prompt}) + "\n" for prompt in PROMPTS))
    command = [
        *(str(Path(sys.executable).with_name("llm-pilot")), "loadtest", "run"),
        *("--target", server.url, "--protocol", "openai-completions", "--served-model", server.model),
        *("--prompts", str(prompts), "--output-tokens", str(OUTPUT_TOKENS), "--free-length", "--workers", "1"),
        *("--users", ",".join(map(str, USERS_COUNTS)), "--warm-up", "2s", "--duration", "10s"),
        *("--format", "json,csv", "--out", str(folder / "out")),
    ]
    run = subprocess.run(command, capture_output=True, text=True, timeout=LOAD_TEST_SECONDS, check=False)
    records = folder / "out" / "records.parquet"
    assert records.exists(), run.stdout + run.stderr
    with (folder / "out" / "stages.csv").open(newline="") as table:
        stages = list(csv.DictReader(table))
    return Outcome(
        exit_code=run.returncode,
        output=run.stdout + run.stderr,
        records=pq.read_table(records).to_pylist(),
        stages=stages,
    )


class _answer:  # noqa: N801 reads as a function
    """A response whose connection is closed with it."""

    def __init__(self, url: str, method: str, path: str, body: bytes | None = None) -> None:
        parts = urlsplit(url)
        self._connection = http.client.HTTPConnection(parts.hostname or "", parts.port or 80, timeout=REQUEST_SECONDS)
        self._connection.request(method, parts.path.rstrip("/") + path, body, {"Content-Type": "application/json"})

    def __enter__(self) -> http.client.HTTPResponse:
        return self._connection.getresponse()

    def __exit__(self, *_: object) -> None:
        self._connection.close()


def _measure(server: Server, prompt: str) -> list[float]:
    """Return when each event with text came, in ms after the request was sent."""
    body = {"model": server.model, "prompt": prompt, "max_tokens": OUTPUT_TOKENS, "temperature": 0, "stream": True}
    start = time.perf_counter()
    with _answer(server.url, "POST", "/v1/completions", json.dumps(body).encode()) as response:
        assert response.status == 200, response.read()
        return [(time.perf_counter() - start) * 1e3 for line in response if _has_text(line)]


def _has_text(line: bytes) -> bool:
    if not line.startswith(b"data: {"):
        return False
    return any(choice.get("text") for choice in json.loads(line[6:])["choices"])


def _of_stage(outcome: Outcome, index: int) -> Iterator[dict[str, object]]:
    return (record for record in outcome.records if record["stage_index"] == index and record["status"] != "cancelled")


def test_every_request_succeeds(outcome: Outcome) -> None:
    for index in range(len(USERS_COUNTS)):
        statuses = [record["status"] for record in _of_stage(outcome, index)]
        assert statuses
        assert set(statuses) == {"ok"}, outcome.output


def test_tokens_are_as_the_server_counts_them(outcome: Outcome) -> None:
    for record in outcome.records:
        if record["status"] == "ok":
            counts = record["chunk_token_counts"]
            assert isinstance(counts, list)
            assert record["token_count_source"] == "server"  # noqa: S105 tokens of text
            assert sum(counts) == record["output_token_count"]
            assert 1 <= sum(counts) <= OUTPUT_TOKENS
            assert record["input_token_count"]


def test_the_kernel_stamps_every_arrival(outcome: Outcome) -> None:
    arrived = [record for record in outcome.records if record["chunk_time_nanos"]]
    assert {record["stamp_source"] for record in arrived} == {"kernel"}
    assert {record["origin"] for record in outcome.records} == {"measured"}


def test_the_latencies_of_one_user_are_those_of_a_plain_client(outcome: Outcome, own: Own) -> None:
    stage = outcome.stages[0]
    assert own.ttft_ms / TOLERANCE < float(stage["ttft_median_ms"]) < own.ttft_ms * TOLERANCE
    assert own.gap_ms / TOLERANCE < float(stage["tpot_median_ms"]) < own.gap_ms * TOLERANCE


def test_as_many_requests_are_under_way_as_there_are_users(outcome: Outcome) -> None:
    for stage, users_count in zip(outcome.stages, USERS_COUNTS, strict=True):
        assert float(stage["concurrency_mean"]) == pytest.approx(users_count, rel=0.25)


def test_the_numbers_count(outcome: Outcome) -> None:
    assert [stage["not_valid_because"] for stage in outcome.stages] == [""] * len(USERS_COUNTS), outcome.output
    assert outcome.exit_code == 0
