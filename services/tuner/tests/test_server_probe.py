"""The server probe against real processes: the simulator in its three dialects, and servers that break.

The simulated GPU has .16 GiB, where the simulator runs out of memory beyond 2,358 tokens in the batch of a server that
copies its cache, and another .72 GiB, where a server with pages has room for 4,810. A step takes milliseconds.
"""

import asyncio
import json
import re
import socket
import subprocess
import sys
import textwrap
import time
from collections.abc import Callable, Iterator
from contextlib import aclosing
from dataclasses import replace
from pathlib import Path
from urllib.request import urlopen

import psutil
import pytest

from llmpilot_contracts.errors import InvalidInputError, PreconditionError
from llmpilot_perfmodel.step_memory.batch import Batch
from llmpilot_tuner.domain.events import CaseRan, Note, ProbeStarted, RunEvent, TuningEnded, TuningStarted
from llmpilot_tuner.domain.plan import Plan, Prediction, plan_of
from llmpilot_tuner.domain.probing import NoSafeWeightError, Outcome, ProbeError, ProbeKind, ProbeTimeoutError
from llmpilot_tuner.domain.result import TuningResult
from llmpilot_tuner.domain.servers import Server
from llmpilot_tuner.domain.spec import ServerTarget, TuningSpec
from llmpilot_tuner.server_probe.tuning import server_events

DEADLINE_SECONDS = 60
COPYING_GPU, PAGED_GPU = "1xTOY-SMALL", "1xTOY-LARGE"
OUT_OF_MEMORY_TOKENS = 2358
"""Of a server that copies its cache: (171.8 MB - weights - runtime) / (3 caches x 16,384 bytes)."""
PAGED_TOKENS = 4810
WEIGHT_BYTES = 52_000_000
TOKEN_BYTES = 3 * 16_384
LLM = {
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
GPU_COLUMNS = {
    "architecture": "Hopper",
    "tensor_core_count": 528,
    "rt_core_count": 0,
    "cuda_core_count": 16896,
    "sm_count": 132,
    "rop_count": 24,
    "tmu_count": 528,
    "cuda_mixed_tflops": "",
    "cuda_fp32_tflops": 67,
    "cuda_fp64_tflops": 34,
    "tensor_bf16_tflops": 989.4,
    "tensor_fp16_tflops": 989.4,
    "tensor_fp32_tflops": 494.7,
    "tensor_tf32_tflops": "",
    "tensor_fp64_tflops": 67,
    "tensor_fp8_tflops": 1978.9,
    "tensor_int8_tops": 1978.9,
    "memory_gb": 1,
    "memory_bandwidth_gb_per_second": 3350,
    "runtime_memory_gib": 0.001,
    "interconnect_gb_per_second": 900,
    "pcie_generation": 5,
    "compute_capability": 9.0,
    "is_sxm": "true",
    "is_nvlink": "true",
    "sources": "a toy for tests",
}
USABLE_GIB = {"TOY-SMALL": 0.16, "TOY-LARGE": 0.72}
SERVE = "from llmpilot_simulator.cli_simulate import simulate; simulate()"


@pytest.fixture(scope="module")
def toys(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with the LLM and the GPUs."""
    folder = tmp_path_factory.mktemp("toys")
    (folder / "config.json").write_text(json.dumps(LLM))
    header = ("name", *GPU_COLUMNS, "usable_memory_gib")
    rows = [(name, *GPU_COLUMNS.values(), usable) for name, usable in USABLE_GIB.items()]
    lines = [",".join(map(str, row)) for row in (header, *rows)]
    (folder / "gpus.csv").write_text("\n".join(lines) + "\n")
    return folder


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


class Bench:
    """A server to be tuned, at addresses of its own, that counts its starts."""

    def __init__(self, toys: Path, folder: Path, server: Server) -> None:
        self.server = server
        self.http, self.grpc = free_port(), free_port()
        self.starts_file = folder / "starts"
        self._toys = toys
        self._folder = folder

    @property
    def url(self) -> str:
        """Where it will answer."""
        return f"grpc://127.0.0.1:{self.grpc}" if self.server is Server.TGIS else f"http://127.0.0.1:{self.http}"

    @property
    def start_count(self) -> int:
        """How often its command was run."""
        return len(self.pids)

    @property
    def pids(self) -> list[int]:
        """The processes that noted themselves."""
        return [int(line) for line in self.starts_file.read_text().split()] if self.starts_file.exists() else []

    def counted(self, script: str) -> tuple[str, ...]:
        """Return a command that runs a script and notes its process id."""
        note = f"import os, sys; open({str(self.starts_file)!r}, 'a').write(f'{{os.getpid()}}\\n')\n"
        path = self._folder / "server.py"
        path.write_text(note + textwrap.dedent(script))
        return (sys.executable, "-u", str(path))

    def simulator(self, *arguments: str, weight: str = "{weight}") -> tuple[str, ...]:
        """Return the command of a simulated server."""
        gpu = COPYING_GPU if self.server is Server.TGIS else PAGED_GPU
        return (
            *self.counted(SERVE),
            *("serve", "--llm", str(self._toys), "--gpus", str(self._toys / "gpus.csv"), "--policy", self.server),
            *("--http", f"127.0.0.1:{self.http}", "--grpc", f"127.0.0.1:{self.grpc}"),
            *(() if "--fixed-ttft-ms" in arguments else ("--gpu", gpu, "--max-batch-weight", weight)),
            *arguments,
        )

    def spec(self, command: tuple[str, ...] = (), **changes: object) -> TuningSpec:
        """Return a spec for it."""
        wanted: dict[str, object] = {"start_seconds": 150.0}  # the simulator may have to compile first
        target = ServerTarget(url=self.url, command=command, **(wanted | _taken(changes, "start_seconds", "log_file")))  # type: ignore[arg-type]
        values: dict[str, object] = {
            "config_json": json.dumps(LLM),
            "probe": ProbeKind.SERVER,
            "server": self.server,
            "gpu_memory_bytes": 172_000_000,
            "reserved_bytes": 1_000_000,
            "longest_sequence": 512,
            "most_new_tokens": 128,
            "most_requests": 16,
            "step_seconds": 20.0,
            "soak_steps": 2,
            "target": target,
        }
        return TuningSpec(**(values | changes))  # type: ignore[arg-type]


def _taken(changes: dict[str, object], *names: str) -> dict[str, object]:
    return {name: changes.pop(name) for name in names if name in changes}


Benches = Callable[[Server], Bench]


@pytest.fixture
def bench(toys: Path, tmp_path: Path) -> Iterator[Benches]:
    """Makes benches; in the end, none of their servers is alive."""
    made: list[Bench] = []

    def make(server: Server) -> Bench:
        made.append(Bench(toys, tmp_path, server))
        return made[-1]

    yield make
    for each in made:
        for pid in each.pids:
            _await(lambda pid=pid: _is_dead(pid), f"process {pid} is left")  # type: ignore[misc]


def _is_dead(pid: int) -> bool:
    """Whether a process has ended; one that nobody has reaped yet holds nothing any more."""
    try:
        return psutil.Process(pid).status() == psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return True


def _await(condition: Callable[[], bool], otherwise: str) -> None:
    deadline = time.monotonic() + DEADLINE_SECONDS
    while not condition():
        assert time.monotonic() < deadline, otherwise
        time.sleep(0.05)


def _answers(url: str) -> bool:
    try:
        with urlopen(url, timeout=DEADLINE_SECONDS):  # noqa: S310 http
            return True
    except OSError:
        return False


class CopiedCache(Prediction):
    """The memory of the simulated TGIS: three caches, and nothing else."""

    def __call__(self, batch: Batch) -> float:
        """Return three caches and the weights."""
        return WEIGHT_BYTES + TOKEN_BYTES * batch.token_count


def planned(spec: TuningSpec) -> Plan:
    """Return a plan whose prefills are those of the simulator, which in TGIS has no limit of them."""
    plan = plan_of(spec)
    return replace(
        plan,
        limits=replace(plan.limits, prefill_limit=2048 if spec.server is not Server.TGIS else None),
        predict=CopiedCache(model=plan.predict.model, weight_bytes=WEIGHT_BYTES),
    )


def tune(spec: TuningSpec, predicted_weight: int) -> list[RunEvent]:
    async def collect() -> list[RunEvent]:
        events = server_events(planned(spec), predicted_weight=predicted_weight)
        return [event async for event in events]

    return asyncio.run(collect())


def result_of(events: list[RunEvent]) -> TuningResult:
    assert isinstance(events[-1], TuningEnded)
    return events[-1].result


def test_a_first_weight_that_is_too_high_is_lowered_at_the_second_start(bench: Benches) -> None:
    tgis = bench(Server.TGIS)
    events = tune(tgis.spec(tgis.simulator()), 4000)
    result = result_of(events)
    assert 0.97 * OUT_OF_MEMORY_TOKENS <= result.max_batch_weight <= OUT_OF_MEMORY_TOKENS
    assert tgis.start_count == 2
    assert isinstance(events[0], TuningStarted)
    assert not result.probes[0].passed
    passed = [probe.weight for probe in result.probes if probe.passed]
    assert result.max_batch_weight + result.margin_weight in passed  # the last of all only if the second start passes
    failed = [event.run for event in events if isinstance(event, CaseRan) and event.run.outcome is not Outcome.PASSED]
    assert failed
    assert "CUDA out of memory (simulated)" in failed[0].message
    assert result.limit == "memory"


@pytest.mark.parametrize("server", list(Server))
def test_a_first_weight_that_passes_needs_one_start(bench: Benches, server: Server) -> None:
    tuned = bench(server)
    weight = 2048 if server is Server.TGIS else 4800
    result = result_of(tune(tuned.spec(tuned.simulator()), weight))
    assert result.max_batch_weight + result.margin_weight == weight
    assert result.margin_weight <= (0.03 * weight if server is Server.TGIS else 0)
    assert tuned.start_count == 1
    assert len(result.probes) == 1
    assert all(run.peak_bytes is None for run in result.probes[0].runs)
    assert result.headroom


def test_a_server_that_has_no_memory_to_start_is_started_with_what_it_has_room_for(bench: Benches) -> None:
    vllm = bench(Server.VLLM)
    result = result_of(tune(vllm.spec(vllm.simulator()), 6000))
    assert 0.6 * PAGED_TOKENS <= result.max_batch_weight <= PAGED_TOKENS
    assert vllm.start_count == 2
    assert any("no start with a weight of 6,000" in note for note in result.notes)


@pytest.fixture(scope="module")
def running(toys: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Bench]:
    """A server that runs, and admits more than it has memory for."""
    tgis = Bench(toys, tmp_path_factory.mktemp("running"), Server.TGIS)
    with subprocess.Popen(tgis.simulator(weight="4000"), stdout=subprocess.DEVNULL) as process:
        try:
            _await(lambda: _answers(f"http://127.0.0.1:{tgis.http}/health"), "the simulator never answered")
            yield tgis
            assert process.poll() is None, "a tuning ended a server that it had not started"
        finally:
            process.kill()


def test_a_server_that_runs_is_verified_at_what_it_is_set_to(running: Bench) -> None:
    events = tune(running.spec(), 4000)
    result = result_of(events)
    assert 0.97 * OUT_OF_MEMORY_TOKENS <= result.max_batch_weight <= OUT_OF_MEMORY_TOKENS
    assert any("only what it is set to was verified" in note for note in result.notes)
    assert any("start it again with" in event.text for event in events if isinstance(event, Note))


def test_a_decode_case_is_there_at_once(running: Bench) -> None:
    result = result_of(tune(running.spec(), 2048))
    said = {run.batch.case: run.message for run in result.probes[0].runs}
    reached = re.match(r"([\d,]+) of 2,048 tokens at once", said["decode_many"])
    assert reached, said
    assert int(reached[1].replace(",", "")) >= 0.97 * 2048


def _await_http(url: str) -> None:
    deadline = time.monotonic() + DEADLINE_SECONDS
    while True:
        try:
            with urlopen(url, timeout=DEADLINE_SECONDS):  # noqa: S310 http
                return
        except OSError:
            assert time.monotonic() < deadline, f"{url} never answered"
            time.sleep(0.05)


def test_a_server_that_dies_at_its_start_is_an_error_with_its_log(bench: Benches) -> None:
    tgis = bench(Server.TGIS)
    with pytest.raises(ProbeError, match="ended with code 3") as caught:
        tune(tgis.spec(tgis.counted("print('no such model'); sys.exit(3)")), 2048)
    assert "no such model" in caught.value.log
    assert tgis.start_count == 1


def test_a_server_that_never_has_memory_to_start_is_started_twice_and_no_more(bench: Benches) -> None:
    tgis = bench(Server.TGIS)
    said = "torch.OutOfMemoryError: CUDA out of memory. Tried to allocate 2.00 GiB."
    with pytest.raises(ProbeError, match="could start neither with a weight of 4,000 nor with"):
        tune(tgis.spec(tgis.counted(f"sys.exit({said!r})")), 4000)
    assert tgis.start_count == 2


def test_a_server_that_never_answers_is_ended_with_all_its_processes(bench: Benches) -> None:
    vllm = bench(Server.VLLM)
    script = f"""
        import signal, subprocess, time
        signal.signal(signal.SIGTERM, signal.SIG_IGN)
        child = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(1000)"])
        open({str(vllm.starts_file)!r}, "a").write(f"{{child.pid}}\\n")
        time.sleep(1000)
    """
    with pytest.raises(ProbeTimeoutError, match=r"did not answer at http://127\.0\.0\.1:"):
        tune(vllm.spec(vllm.counted(script), start_seconds=1.0), 4800)
    assert len(vllm.pids) == 2


@pytest.mark.parametrize(
    ("fault", "server", "said"),
    [
        ("reject=503", Server.VLLM, "turns requests away"),
        ("reset-after=1", Server.VLLM, "the server failed"),
    ],
)
def test_another_error_is_no_limit_of_memory(bench: Benches, fault: str, server: Server, said: str) -> None:
    tuned = bench(server)
    with pytest.raises(ProbeError, match=said):
        tune(tuned.spec(tuned.simulator("--fault", fault)), 1024)
    assert tuned.start_count == 1


def test_a_server_that_always_runs_out_of_memory_has_no_safe_weight(bench: Benches) -> None:
    tgi = bench(Server.TGIS)
    with pytest.raises(NoSafeWeightError, match="not even a maximum batch weight of 512"):
        tune(tgi.spec(tgi.simulator("--fault", "out-of-memory-after=0")), 600)


def test_a_server_that_stops_in_the_middle_of_a_reply_is_stuck(bench: Benches) -> None:
    vllm = bench(Server.VLLM)
    command = vllm.simulator("--fixed-ttft-ms", "1", "--fixed-itl-ms", "1000000")
    with pytest.raises(ProbeTimeoutError, match="no token came from the server"):
        tune(vllm.spec(command, step_seconds=1.0), 1024)


BREAKING = """
    import http.server
    class Handler(http.server.BaseHTTPRequestHandler):
        def do_GET(self):
            self.send_response(200)
            self.end_headers()
            self.wfile.write(b'{{"model_id": "m", "max_total_tokens": 512, "max_input_tokens": 511}}')
        def do_POST(self):
            print({said!r}, flush=True)
            os._exit(1)
    http.server.ThreadingHTTPServer(("127.0.0.1", {port}), Handler).serve_forever()
"""


def test_a_server_that_dies_of_memory_ran_out_of_it(bench: Benches) -> None:
    tgi = bench(Server.TGI)
    said = "torch.OutOfMemoryError: CUDA out of memory. Tried to allocate 20.00 MiB. GPU 0 is full"
    with pytest.raises(ProbeError, match="ran out of memory in both starts") as caught:
        tune(tgi.spec(tgi.counted(BREAKING.format(said=said, port=tgi.http))), 4000)
    # 25 MB (1.25 x 20 MiB) less than the 171 MB that there are: (171 - 26.2 - 52) MB / 49,152 bytes
    assert "weights 4,000, 1," in str(caught.value)
    assert tgi.start_count == 2


def test_a_server_that_dies_of_something_else_is_an_error(bench: Benches) -> None:
    tgi = bench(Server.TGI)
    said = "RuntimeError: CUDA error: an illegal memory access was encountered"
    with pytest.raises(ProbeError, match="the server ended with code 1") as caught:
        tune(tgi.spec(tgi.counted(BREAKING.format(said=said, port=tgi.http))), 4000)
    assert "illegal memory access" in caught.value.log
    assert tgi.start_count == 1


def test_a_tuning_that_is_left_leaves_no_server(bench: Benches) -> None:
    tgis = bench(Server.TGIS)
    spec = tgis.spec(tgis.simulator())

    async def leave() -> None:
        events = server_events(planned(spec), predicted_weight=2048)
        async with aclosing(events):
            async for event in events:
                if isinstance(event, ProbeStarted):
                    return

    asyncio.run(leave())
    assert tgis.start_count == 1


def test_an_address_where_another_server_answers_is_refused(running: Bench) -> None:
    with pytest.raises(PreconditionError, match="another server answers at grpc://"):
        tune(running.spec(("no-such-server",)), 1024)


def test_nobody_at_the_address_is_said(bench: Benches) -> None:
    vllm = bench(Server.VLLM)
    with pytest.raises(ProbeError, match="no healthy vllm server answers at"):
        tune(vllm.spec(), 1024)


def test_limits_beyond_the_servers_own_are_refused(running: Bench) -> None:
    spec = running.spec(longest_sequence=600)
    spec = replace(spec, config_json=json.dumps(LLM | {"max_position_embeddings": 1024}))
    with pytest.raises(InvalidInputError, match="longest_sequence: is 600, the server admits 512"):
        tune(spec, 2048)


@pytest.mark.parametrize("url", ["http://127.0.0.1:1", "127.0.0.1:1", "grpc://"])
def test_tgis_is_spoken_to_over_grpc(bench: Benches, url: str) -> None:
    spec = bench(Server.TGIS).spec()
    with pytest.raises(InvalidInputError, match="must be grpc://HOST:PORT"):
        tune(TuningSpec(**{**_fields(spec), "target": ServerTarget(url=url)}), 1024)  # type: ignore[arg-type]


def _fields(spec: TuningSpec) -> dict[str, object]:
    return {name: getattr(spec, name) for name in spec.__slots__}


def test_a_command_that_is_not_there_is_said(bench: Benches) -> None:
    tgis = bench(Server.TGIS)
    with pytest.raises(PreconditionError, match="cannot be run: no-such-server"):
        tune(tgis.spec(("no-such-server", "{weight}")), 1024)


def test_a_setting_that_no_server_has_is_refused(bench: Benches) -> None:
    tgis = bench(Server.TGIS)
    with pytest.raises(InvalidInputError, match="cannot be filled in"):
        tune(tgis.spec(("serve", "{wieght}")), 1024)


def test_a_running_server_that_does_not_say_what_it_is_set_to_is_credited_with_what_it_held(
    toys: Path, tmp_path: Path
) -> None:
    """It says nothing as its times are those of another server, and reserves 1,000 tokens; the guess is 4,000."""
    silent = Bench(toys, tmp_path, Server.TGIS)
    with subprocess.Popen(silent.simulator(weight="1000"), stdout=subprocess.DEVNULL) as process:
        try:
            _await(lambda: _answers(f"http://127.0.0.1:{silent.http}/health"), "the simulator never answered")
            spec = silent.spec(server=Server.VLLM)
            spec = replace(spec, target=ServerTarget(url=f"http://127.0.0.1:{silent.http}"))
            result = result_of(tune(spec, 4000))
        finally:
            process.kill()
    assert 512 <= result.max_batch_weight <= 1000
    assert any("the server does not say what it is set to" in note for note in result.notes)
