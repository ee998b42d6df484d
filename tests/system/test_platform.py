"""The platform as a user meets it: processes, the README's words, real NATS."""

import json
import os
import re
import shlex
import signal
import subprocess
import sys
import sysconfig
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import grpc
import psutil
import pytest

from llmpilot.catalog.v1.llm_pb2 import Llm
from llmpilot.recommendation.v1 import recommendation_pb2 as pb
from llmpilot.recommendation.v1.recommendation_pb2_grpc import RecommendationServiceStub
from llmpilot_recommender.dataset_file import BUNDLED_DATASET, read_dataset, write_dataset

ROOT = Path(__file__).parents[2]
README = (ROOT / "README.md").read_text()
BUF = str(Path(sysconfig.get_path("scripts")) / "buf")
DEADLINE_SECONDS = 30
START_SECONDS = 60
STOP_SECONDS = 30
PROGRAM = str(Path(sysconfig.get_path("scripts")) / "llm-pilot")


@dataclass(frozen=True, slots=True, kw_only=True)
class RunningUp:
    """`llm-pilot up` as a process of its own."""

    process: subprocess.Popen[str]
    home: Path
    environment: dict[str, str]

    @property
    def state(self) -> dict[str, object]:
        """What platform.json says."""
        content: dict[str, object] = json.loads((self.home / "platform.json").read_text())
        return content

    @property
    def grpc_address(self) -> str:
        """Where the recommender listens."""
        services = self.state["services"]
        assert isinstance(services, dict)
        return str(services["recommender"]["grpc"])

    @property
    def nats_url(self) -> str:
        """Where NATS listens."""
        return str(self.state["nats_url"])


def started_up(home: Path) -> RunningUp:
    """Start a platform in `home` on free ports and wait until it runs."""
    environment = {key: value for key, value in os.environ.items() if not key.startswith("LLMPILOT_")}
    environment["LLMPILOT_HOME"] = str(home)
    process = subprocess.Popen(
        [PROGRAM, "up", "--port", "0"], env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
    )
    assert process.stdout is not None
    deadline = time.monotonic() + START_SECONDS
    while not (line := process.stdout.readline()).startswith("LLM-Pilot runs"):
        assert line, f"llm-pilot up ended with {process.wait(STOP_SECONDS)}"
        assert time.monotonic() < deadline
    return RunningUp(process=process, home=home, environment=environment)


def stopped(up: RunningUp) -> int:
    """Stop a platform and return its exit code."""
    up.process.terminate()
    up.process.communicate(timeout=STOP_SECONDS)
    return up.process.returncode


@pytest.fixture(scope="module")
def up(tmp_path_factory: pytest.TempPathFactory) -> Iterator[RunningUp]:
    running = started_up(tmp_path_factory.mktemp("home"))
    yield running
    stopped(running)


def blocks(language: str) -> list[str]:
    return re.findall(rf"```{language}\n(.*?)```", README, flags=re.DOTALL)


def run(command: list[str], up: RunningUp | None = None, **variables: str) -> subprocess.CompletedProcess[str]:
    environment = (up.environment if up else dict(os.environ)) | variables
    return subprocess.run(command, env=environment, capture_output=True, text=True, timeout=120, check=False)


def test_readme_python_example_prints_the_recommendation(up: RunningUp) -> None:
    (code,) = blocks("python")
    done = run([sys.executable, "-W", "error", "-c", code.replace("127.0.0.1:50051", up.grpc_address)])
    assert done.returncode == 0, done.stderr
    assert "serve 200 users within the limits (predicted)." in done.stdout
    assert done.stdout.splitlines()[1].startswith("1xA100-40GB 4 16.385")


def test_readme_buf_curl_example_prints_the_recommendation(up: RunningUp, tmp_path: Path) -> None:
    (command,) = [block for block in blocks("sh") if block.startswith("buf curl")]
    words = shlex.split(command.replace("127.0.0.1:50051", up.grpc_address).replace("\\\n", " "))
    done = run([BUF, *words[1:]], HOME=str(tmp_path))
    assert done.returncode == 0, done.stderr
    assert "serve 200 users within the limits" in json.loads(done.stdout)["summary"]


def test_readme_recommend_and_predict_commands_work(up: RunningUp) -> None:
    commands = [
        line for block in blocks("sh") for line in block.splitlines() if re.match(r"llm-pilot (rec|pred)", line)
    ]
    assert len(commands) == 3
    for command in commands:
        done = run([PROGRAM, *shlex.split(command)[1:]], up)
        assert done.returncode == 0, done.stderr


def test_recommend_uses_the_running_platform(up: RunningUp) -> None:
    done = run([PROGRAM, "recommend", *QUESTION, "--json"], up)
    assert done.returncode == 0
    assert json.loads(done.stdout)["options"][0]["gpuProfile"] == "1xA100-40GB"
    assert "starting" not in done.stderr


QUESTION = ["--config", "meta-llama/Llama-3.1-8B", "--users", "200", "--nttft-ms", "100", "--itl-ms", "50"]


def test_recommend_alone_starts_what_it_needs_and_leaves_nothing(tmp_path: Path) -> None:
    mark = str(tmp_path)
    done = run([PROGRAM, "recommend", *QUESTION], LLMPILOT_HOME=mark, LLMPILOT_RECOMMENDER_ADDRESS="")
    assert done.returncode == 0, done.stderr
    assert "cheapest, predicted" in done.stdout
    assert descendants_marked(mark) == []


def descendants_marked(mark: str) -> list[psutil.Process]:
    found = []
    for process in psutil.process_iter():
        try:
            if process.environ().get("LLMPILOT_HOME") == mark:
                found.append(process)
        except psutil.Error:  # it ended, or is not ours to see
            continue
    return found


def test_wrong_input_is_one_message_with_every_problem(up: RunningUp) -> None:
    wrong = ["--config", "llama-13b", "--users", "0", "--nttft-ms", "-1", "--itl-ms", "nan", "--candidate", "3xA100"]
    done = run([PROGRAM, "recommend", *wrong], up)
    assert done.returncode == 2
    for field in ("users_count", "limits.nttft_ms", "limits.itl_ms", "gpu_profiles.names[0]"):
        assert field in done.stderr
    assert "Traceback" not in done.stderr


def test_publishing_to_nobody_is_one_message() -> None:
    done = run([PROGRAM, "dataset", "publish", str(BUNDLED_DATASET), "--nats-url", "nats://127.0.0.1:1"])
    assert done.returncode == 1
    assert done.stdout == ""
    assert "error: NATS at nats://127.0.0.1:1 does not answer" in done.stderr
    assert "Traceback" not in done.stderr


def test_recommend_answers_while_nats_is_dead_and_the_supervisor_brings_it_back(up: RunningUp) -> None:
    (nats,) = [child for child in psutil.Process(up.process.pid).children(recursive=True) if "nats" in child.name()]
    nats.send_signal(signal.SIGKILL)
    with grpc.insecure_channel(up.grpc_address) as channel:
        answer = RecommendationServiceStub(channel).Recommend(question(), timeout=DEADLINE_SECONDS)
    assert answer.options
    one_row = up.home / "row.csv"
    write_dataset(one_row, read_dataset(BUNDLED_DATASET).measurements[:1], {"source": "test"})
    deadline = time.monotonic() + DEADLINE_SECONDS
    while run([PROGRAM, "dataset", "publish", str(one_row), "--nats-url", up.nats_url], up).returncode:
        assert time.monotonic() < deadline


def question() -> pb.RecommendRequest:
    return pb.RecommendRequest(
        llm=Llm(name="meta-llama/Llama-3.1-8B"), limits=pb.LatencyLimits(nttft_ms=100, itl_ms=50), users_count=200
    )


@pytest.mark.timeout(180)
def test_published_measurements_outlive_the_platform(tmp_path: Path) -> None:
    """The stream is the system of record: a new recommender replays what an earlier one was told."""
    mine = [row for row in read_dataset(BUNDLED_DATASET).measurements if row.llm == "llama-13b"]
    renamed = tmp_path / "mine.csv"
    text = BUNDLED_DATASET.read_text().splitlines()
    header = next(line for line in text if line.startswith("llm,"))
    rows = [line.replace("llama-13b", "my/llm") for line in text if line.startswith("llama-13b,")]
    assert len(rows) == len(mine)
    renamed.write_text("\n".join(["# schema: 1", "# source: test", header, *rows]) + "\n")
    spec = Llm(name="my/llm", config_json=CONFIG)
    for published in (False, True):
        up = started_up(tmp_path)
        try:
            if not published:
                done = run([PROGRAM, "dataset", "publish", str(renamed), "--nats-url", up.nats_url], up)
                assert done.returncode == 0, done.stderr
            with grpc.insecure_channel(up.grpc_address) as channel:
                stub = RecommendationServiceStub(channel)
                request = pb.PredictRequest(llm=spec, gpu_profile="1xH100-80GB")
                deadline = time.monotonic() + DEADLINE_SECONDS
                while stub.Predict(request, timeout=DEADLINE_SECONDS).points[0].basis != pb.BASIS_MEASURED:
                    assert time.monotonic() < deadline
        finally:
            assert stopped(up) == 0


CONFIG = json.dumps(
    {
        "model_type": "llama",
        "num_hidden_layers": 40,
        "num_attention_heads": 40,
        "hidden_size": 5120,
        "intermediate_size": 13824,
        "vocab_size": 32000,
        "max_position_embeddings": 4096,
        "torch_dtype": "float16",
    }
)
