"""The tuner's two modes, with real processes and a real nats-server: a server starts with the weight that was found.

An init step tunes, writes the server's settings and exits; a sidecar serves TuningService. Each time one number is in
the file or the reply, in what the simulator says it has, and in the event on NATS.
"""

import asyncio
import json
import os
import re
import subprocess
import sys
import sysconfig
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from urllib.request import Request, urlopen

import grpc
import nats
import pytest

from llmpilot.catalog.v1 import llm_pb2
from llmpilot.tuning.v1 import tuning_pb2 as pb
from llmpilot.tuning.v1.tuning_pb2_grpc import TuningServiceStub
from llmpilot_servicekit.client import wait_until_serving
from llmpilot_servicekit.nats_server import start_nats_server

DEADLINE_SECONDS = 60
PROGRAM = str(Path(sysconfig.get_path("scripts")) / "llm-pilot")
LLM, GPU = "llama-3.1-8b", "1xA100-40GB"
SET_ASIDE = 2 * 2**30
"""A little more than the simulator counts beside the LLM, so that it has memory for the weight."""
PREFILL_LIMIT = 10**6
"""None: the simulated TGIS is the paper's, which reads any number of prompts at once, and makes all their logits."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Serving:
    """A simulated server that listens."""

    url: str
    said: str
    """What it said of itself until then."""


def without_settings() -> dict[str, str]:
    return {name: value for name, value in os.environ.items() if not name.startswith("LLMPILOT_")}


def tuned(*arguments: str) -> subprocess.CompletedProcess[str]:
    """`llm-pilot tune`, to its end."""
    command = [PROGRAM, "tune", "--config", LLM, "--gpu", GPU, "--reserve", f"{SET_ASIDE}B"]
    command += ["--prompt-logprobs", "--prefill-limit", str(PREFILL_LIMIT), *arguments]
    return subprocess.run(
        command, env=without_settings(), capture_output=True, text=True, timeout=DEADLINE_SECONDS, check=False
    )


@contextmanager
def simulator(arguments: str, *, llm: str = LLM, settings: Path | None = None) -> Iterator[Serving]:
    """`llm-pilot simulate serve` with these arguments, which may name the variables of a file of settings."""
    serve = f"exec '{PROGRAM}' simulate serve --llm {llm} --gpu {GPU} --http 127.0.0.1:0 --grpc 127.0.0.1:0 {arguments}"
    script = f"set -a; . '{settings}'; set +a; {serve}" if settings else serve
    environment = without_settings() | {"PYTHONUNBUFFERED": "1"}
    process = subprocess.Popen(
        ["/bin/sh", "-c", script], env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
    )
    try:
        assert process.stdout is not None
        lines: list[str] = []
        for line in process.stdout:
            lines.append(line)
            if listening := re.search(r"http://[0-9.:]+", line):
                yield Serving(url=listening[0], said="".join(lines))
                break
        else:
            pytest.fail(f"it ended before it listened: {lines}")
    finally:
        process.terminate()
        process.communicate(timeout=DEADLINE_SECONDS)


def reply_tokens(serving: Serving) -> int:
    """How many tokens it answers a request for eight with."""
    body = json.dumps({"prompt": "Hello", "max_tokens": 8, "ignore_eos": True}).encode()
    request = Request(f"{serving.url}/v1/completions", body, {"Content-Type": "application/json"})  # noqa: S310 http
    with urlopen(request, timeout=DEADLINE_SECONDS) as answer:  # noqa: S310
        usage = json.load(answer)["usage"]
    return int(usage["completion_tokens"])


def variables_of(file: Path) -> dict[str, str]:
    return dict(line.split("=", 1) for line in file.read_text().splitlines() if not line.startswith("#"))


def events(url: str) -> dict[str, pb.TuningCompleted]:
    """What was published, read with a plain client, by the names of the tunings."""

    async def read() -> dict[str, pb.TuningCompleted]:
        client = await nats.connect(url)
        count = (await client.jetstream().stream_info("TUNING_RESULTS")).state.messages
        subscription = await client.jetstream().subscribe("llmpilot.tuning.v1.completed", ordered_consumer=True)
        found = [pb.TuningCompleted.FromString((await subscription.next_msg(timeout=10)).data) for _ in range(count)]
        await client.close()
        return {event.tuning.name: event for event in found}

    return asyncio.run(read())


@pytest.fixture(scope="module")
def nats_url(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    with start_nats_server(tmp_path_factory.mktemp("nats")) as server:
        yield server.url


def test_after_the_init_step_the_server_starts_with_the_weight_that_was_published(
    nats_url: str, tmp_path: Path
) -> None:
    file = tmp_path / "server.env"
    done = tuned("--probe", "analytic", "--env-file", str(file), "--nats", nats_url)
    assert done.returncode == 0, done.stderr
    weight = int(variables_of(file)["MAX_BATCH_WEIGHT"])
    arguments = '--max-batch-weight "$MAX_BATCH_WEIGHT" --context-length "$MAX_SEQUENCE_LENGTH"'
    with simulator(arguments, settings=file) as serving:
        assert f"maximum batch weight {weight:,} tokens\n" in serving.said
        assert reply_tokens(serving) == 8
    (name,) = re.findall(r"tunings/[\w-]+", done.stderr)
    event = events(nats_url)[name]
    assert event.tuning.max_batch_weight == weight
    assert event.tuning.spec.reserved_bytes == SET_ASIDE


def test_an_init_step_that_finds_nothing_stops_the_server_from_starting(tmp_path: Path) -> None:
    """Its exit status says so, and there is no file that a server could start with."""
    file = tmp_path / "server.env"
    done = tuned("--longest-sequence", "131072", "--max-new-tokens", "65536", "--env-file", str(file))
    assert done.returncode == 1
    assert "lower --longest-sequence" in done.stderr
    assert list(tmp_path.iterdir()) == []


@pytest.fixture(scope="module")
def sidecar(nats_url: str, tmp_path_factory: pytest.TempPathFactory) -> Iterator[TuningServiceStub]:
    """`python -m llmpilot_tuner` as a process; it ends without an error when it is told to."""
    folder = tmp_path_factory.mktemp("sidecar")
    address_file, log = folder / "address.json", folder / "log"
    settings = {
        "LLMPILOT_LISTEN": "127.0.0.1:0",
        "LLMPILOT_ADDRESS_FILE": str(address_file),
        "LLMPILOT_NATS_URL": nats_url,
    }
    with log.open("wb") as stream:
        process = subprocess.Popen(
            [sys.executable, "-m", "llmpilot_tuner"], env=without_settings() | settings, stdout=stream, stderr=stream
        )
    try:
        address = listening_at(address_file, process, log)
        wait_until_serving(address, DEADLINE_SECONDS)
        with grpc.insecure_channel(address) as channel:
            yield TuningServiceStub(channel)
    finally:
        process.terminate()
        status = process.wait(DEADLINE_SECONDS)
    assert status == 0, log.read_text()
    assert "Traceback" not in log.read_text(), log.read_text()


def listening_at(address_file: Path, process: subprocess.Popen[bytes], log: Path) -> str:
    """Where a service listens, once it has NATS."""
    deadline = time.monotonic() + DEADLINE_SECONDS
    while not (address_file.exists() and "connected to NATS" in log.read_text()):
        assert process.poll() is None, log.read_text()
        assert time.monotonic() < deadline, log.read_text()
        time.sleep(0.01)
    return str(json.loads(address_file.read_text())["grpc"])


def watched(sidecar: TuningServiceStub, spec: pb.TuningSpec, request_id: str) -> list[pb.TuningEvent]:
    """Create a tuning, and give its events to its end."""
    made = sidecar.CreateTuning(
        pb.CreateTuningRequest(spec=spec, request_id=request_id), timeout=DEADLINE_SECONDS, wait_for_ready=True
    ).tuning
    assert made.state == pb.STATE_PENDING
    call = sidecar.WatchTuning(pb.WatchTuningRequest(name=made.name), timeout=DEADLINE_SECONDS)
    return [answer.event for answer in call]


def test_a_sidecars_weight_starts_the_server_and_is_on_nats(sidecar: TuningServiceStub, nats_url: str) -> None:
    spec = pb.TuningSpec(
        llm=llm_pb2.Llm(name=LLM),
        probe=pb.PROBE_KIND_ANALYTIC,
        server=pb.SERVER_KIND_TGIS,
        gpu_profile=GPU,
        reserved_bytes=SET_ASIDE,
        prefill_limit=PREFILL_LIMIT,
        prompt_logprobs=True,
    )
    ended = watched(sidecar, spec, "analytic")[-1].changed
    assert ended.state == pb.STATE_SUCCEEDED, ended.error
    weight = ended.max_batch_weight
    with simulator(f"--max-batch-weight {weight} --context-length {ended.spec.longest_sequence}") as serving:
        assert f"maximum batch weight {weight:,} tokens\n" in serving.said
        assert reply_tokens(serving) == 8
    event = events(nats_url)[ended.name]
    assert event.tuning == ended
    assert json.loads(event.tuning.report_json)["max_batch_weight"] == weight


SMALL_LLM = {
    "model_type": "llama",
    "architectures": ["LlamaForCausalLM"],
    "hidden_size": 512,
    "intermediate_size": 1376,
    "num_hidden_layers": 8,
    "num_attention_heads": 8,
    "num_key_value_heads": 8,
    "vocab_size": 2048,
    "max_position_embeddings": 512,
    "tie_word_embeddings": False,
    "torch_dtype": "float16",
}


def test_a_sidecar_verifies_the_server_beside_it(sidecar: TuningServiceStub, nats_url: str, tmp_path: Path) -> None:
    """The simulator, as TGI, says what it is set to; the corner cases of that weight are sent to it."""
    (tmp_path / "config.json").write_text(json.dumps(SMALL_LLM))
    served = 4000
    with simulator(f"--policy tgi --max-batch-weight {served}", llm=str(tmp_path)) as serving:
        spec = pb.TuningSpec(
            llm=llm_pb2.Llm(name="small", config_json=json.dumps(SMALL_LLM)),
            probe=pb.PROBE_KIND_SERVER,
            server=pb.SERVER_KIND_TGI,
            gpu_profile=GPU,
            longest_sequence=512,
            most_new_tokens=128,
            most_requests=16,
            soak_steps=0,
            target=pb.ServerTarget(url=serving.url),
        )
        said = watched(sidecar, spec, "server")
        again = watched(sidecar, spec, "server again")[-1].changed
    ended = said[-1].changed
    assert ended.state == pb.STATE_SUCCEEDED, ended.error
    assert ended.max_batch_weight == served
    assert ended.measured
    assert (again.from_cache, again.max_batch_weight) == (False, served)  # what runs there may be another server by now
    cases = [event.case_completed for event in said if event.HasField("case_completed")]
    assert cases
    assert all(case.passed and case.weight == served for case in cases)
    assert events(nats_url)[ended.name].tuning.max_batch_weight == served
