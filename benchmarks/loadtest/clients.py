"""The load testers that are compared: how each is started, and how its own report is read.

Each lives in an environment of its own below one folder (the Makefile and requirements know nothing of them):

    uv venv -p 3.11 locust          && uv pip install -p locust/bin/python locust
    uv venv -p 3.12 aiperf          && uv pip install -p aiperf/bin/python aiperf
    uv venv -p 3.12 inference-perf  && uv pip install -p inference-perf/bin/python inference-perf
    uv venv -p 3.11 guidellm        && uv pip install -p guidellm/bin/python -f WHEELS guidellm torch==2.13.0+cpu
    pip download --no-deps vllm && unzip -j vllm-*.whl vllm/vllm-rs -d vllm-rs && chmod +x vllm-rs/vllm-rs
    tok/                               a Hugging Face tokenizer for those that insist on one

Invariant: a reader takes the client's numbers as they stand in its report; what is missing there is None.
"""

import json
import sys
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import numpy.typing as npt
import pyarrow.parquet as pq

REPLY_SECONDS_OVERHEAD = 0.05
TOKEN_SECONDS = 0.01
WARM_UP_SECONDS = 2

Floats = npt.NDArray[np.float64]


@dataclass(frozen=True, slots=True, kw_only=True)
class Run:
    """One client under one load."""

    url: str
    model: str
    streams: int = 0
    """0: open loop."""
    rate_per_second: float = 0.0
    seconds: float
    output_tokens: int
    folder: Path
    """Where reports go."""
    peers: Path

    @property
    def request_count(self) -> int:
        """As many requests as take about `seconds`."""
        if not self.streams:
            return round(self.rate_per_second * self.seconds)
        return round(self.streams * self.seconds / (REPLY_SECONDS_OVERHEAD + TOKEN_SECONDS * self.output_tokens))

    @property
    def in_flight_most(self) -> int:
        """More concurrent requests than an open loop will need."""
        return self.streams or 1000

    @property
    def tokenizer(self) -> str:
        """A folder."""
        return str(self.peers / "tok")


@dataclass(frozen=True, slots=True, kw_only=True)
class Reply:
    """What a client says of one request."""

    ttft_ms: float
    gaps_ms: Floats
    request_id: str = ""
    """Empty: the server was not told. Of one with dashes, the last part is enough."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Report:
    """What a client says of a run: replies, or else the quantiles that it gives."""

    replies: tuple[Reply, ...] = ()
    ttft_p50_p99_ms: tuple[float, float] | None = None
    itl_p50_p99_ms: tuple[float, float] | None = None
    export_bytes: int | None = None
    """Of the most detailed export of `exported_tokens`."""
    note: str = ""

    def ttft_quantiles_ms(self) -> tuple[float, float] | None:
        """Return median and p99."""
        if self.replies:
            return _p50_p99(np.array([reply.ttft_ms for reply in self.replies]))
        return self.ttft_p50_p99_ms

    def itl_quantiles_ms(self) -> tuple[float, float] | None:
        """Return median and p99 of all gaps."""
        if self.replies and self.itl_p50_p99_ms is None:
            return _p50_p99(np.concatenate([reply.gaps_ms for reply in self.replies]))
        return self.itl_p50_p99_ms


@dataclass(frozen=True, slots=True, kw_only=True)
class Client:
    """A load tester."""

    name: str
    program: str
    """Below the folder of peers; a client whose program is absent is skipped. Empty: it is part of this project."""
    command: Callable[[Run], list[str]]
    read: Callable[[Run], Report]
    environment: Callable[[Run], Mapping[str, str]] = field(default=lambda _: {})
    can_be_open: bool = True
    part: str = ""
    """Of the command lines of processes whose CPU is also told apart."""


def _p50_p99(values: Floats) -> tuple[float, float]:
    p50, p99 = np.percentile(values, (50, 99))
    return float(p50), float(p99)


# This project


def _llm_pilot_command(run: Run) -> list[str]:
    load = ["--users", str(run.streams)] if run.streams else ["--rate", f"{run.rate_per_second:g}"]
    return [
        *(str(Path(sys.executable).with_name("llm-pilot")), "loadtest", "run", "--target", run.url, "--workers", "1"),
        *("--input-tokens", "32", "--output-tokens", str(run.output_tokens), *load, "--warm-up", f"{WARM_UP_SECONDS}s"),
        *(
            "--duration",
            f"{run.seconds - WARM_UP_SECONDS:g}s",
            "--format",
            "json",
            "--out",
            str(run.folder / "llm-pilot"),
        ),
    ]


def _llm_pilot_environment(run: Run) -> dict[str, str]:
    return {"LLMPILOT_HOME": str(run.folder / "home")}  # its own services, whoever else keeps some running


def _llm_pilot_report(run: Run) -> Report:
    folder = run.folder / "llm-pilot"
    records = pq.read_table(folder / "records.parquet")
    indices, statuses, sent, chunks = (
        records[name].to_pylist() for name in ("request_index", "status", "send_time_nanos", "chunk_time_nanos")
    )
    verdict = json.loads((folder / "stage-00.vllm.json").read_text())
    return Report(
        replies=tuple(
            Reply(
                request_id=f"{index}",
                ttft_ms=(stamps[0] - send_nanos) / 1e6,
                gaps_ms=np.diff(np.array(stamps, float)) / 1e6,
            )
            for index, status, send_nanos, stamps in zip(indices, statuses, sent, chunks, strict=True)
            if status == "ok"
        ),
        export_bytes=(folder / "records.parquet").stat().st_size,
        note="valid" if verdict["valid"] else f"not valid: {' '.join(verdict['not_valid_because'])}",
    )


# A loop over bare sockets


def _bare_command(run: Run) -> list[str]:
    script = Path(__file__).with_name("bare_client.py")
    address = run.url.removeprefix("http://")
    arguments = [address, run.model, run.streams, run.seconds, run.output_tokens, run.folder / "bare.json"]
    return [sys.executable, str(script), *map(str, arguments)]


def _bare_report(run: Run) -> Report:
    replies = json.loads((run.folder / "bare.json").read_text())
    return Report(
        replies=tuple(
            Reply(
                request_id=name, ttft_ms=(stamps[0] - send_nanos) / 1e6, gaps_ms=np.diff(np.array(stamps, float)) / 1e6
            )
            for name, send_nanos, stamps in replies
            if len(stamps) == run.output_tokens
        )
    )


# Plain Locust


def _locust_command(run: Run) -> list[str]:
    script = Path(__file__).with_name("locustfile.py")
    program = str(run.peers / "locust/bin/locust")
    load = ["-u", str(run.streams), "-r", str(run.streams), "-t", f"{run.seconds:.0f}s", "--stop-timeout", "5"]
    return [program, "-f", str(script), "--headless", "--only-summary", *load, "-H", run.url]


def _locust_environment(run: Run) -> dict[str, str]:
    return {
        "MODEL": run.model,
        "OUTPUT_TOKENS": str(run.output_tokens),
        "RESULT": str(run.folder / "locust.jsonl"),
    }


def _locust_report(run: Run) -> Report:
    lines = [json.loads(line) for line in (run.folder / "locust.jsonl").read_text().splitlines()]
    return Report(
        replies=tuple(
            Reply(request_id=line["id"], ttft_ms=line["ttft"] * 1e3, gaps_ms=np.array(line["itls"]) * 1e3)
            for line in lines
        )
    )


# vllm bench serve, the Rust client


def _vllm_command(run: Run) -> list[str]:
    load = ["--max-concurrency", str(run.streams)] if run.streams else ["--request-rate", f"{run.rate_per_second:g}"]
    return [
        *(str(run.peers / "vllm-rs/vllm-rs"), "bench", "serve", "--backend", "openai", "--base-url", run.url),
        *("--endpoint", "/v1/completions", "--model", run.model, "--tokenizer", run.tokenizer),
        *("--dataset-name", "random", "--random-input-len", "32", "--random-output-len", str(run.output_tokens)),
        *("--num-prompts", str(run.request_count), "--ignore-eos", "--request-id-prefix", "rs-", *load),
        *("--save-result", "--save-detailed", "--result-dir", str(run.folder), "--result-filename", "vllm.json"),
        "--disable-tqdm",
    ]


def _vllm_report(run: Run) -> Report:
    path = run.folder / "vllm.json"
    report = json.loads(path.read_text())
    return Report(
        replies=tuple(
            Reply(request_id=f"rs-{index}", ttft_ms=ttft * 1e3, gaps_ms=np.array(gaps) * 1e3)
            for index, (ttft, gaps) in enumerate(zip(report["ttfts"], report["itls"], strict=True))
            if len(gaps) == run.output_tokens - 1
        ),
        export_bytes=path.stat().st_size,
    )


# inference-perf


def _inference_perf_command(run: Run) -> list[str]:
    fixed = {"type": "fixed", "total_count": run.request_count}
    lengths = {"min": 32, "max": 32, "mean": 32}, dict.fromkeys(("min", "max", "mean"), run.output_tokens)
    if run.streams:
        stage: dict[str, object] = {"num_requests": run.request_count, "concurrency_level": run.streams}
    else:
        stage = {"rate": run.rate_per_second, "duration": int(run.seconds)}
    configuration = {
        "api": {"type": "completion", "streaming": True},
        "data": {
            "type": "random",
            "input_distribution": lengths[0] | fixed,
            "output_distribution": lengths[1] | fixed,
        },
        "load": {
            "type": "concurrent" if run.streams else "poisson",
            "num_workers": 1,
            "worker_max_concurrency": run.in_flight_most,
            "stages": [stage],
        },
        "server": {"type": "vllm", "model_name": run.model, "base_url": run.url, "ignore_eos": True},
        "tokenizer": {"pretrained_model_name_or_path": run.tokenizer},
        "report": {"request_lifecycle": {"per_stage": False, "per_request": True, "percentiles": [50, 99]}},
        "storage": {"local_storage": {"path": str(run.folder / "inference-perf")}},
    }
    path = run.folder / "inference-perf.yaml"
    path.write_text(json.dumps(configuration))  # JSON is YAML
    return [str(run.peers / "inference-perf/bin/inference-perf"), "-c", str(path)]


def _inference_perf_report(run: Run) -> Report:
    folder = run.folder / "inference-perf"
    latency = json.loads((folder / "summary_lifecycle_metrics.json").read_text())["successes"]["latency"]
    ttft, itl = latency["time_to_first_token"], latency["inter_token_latency"]
    return Report(
        ttft_p50_p99_ms=(ttft["median"] * 1e3, ttft["p99"] * 1e3),
        itl_p50_p99_ms=(itl["median"] * 1e3, itl["p99"] * 1e3),
        export_bytes=(folder / "per_request_lifecycle_metrics.json").stat().st_size,
    )


# aiperf


def _aiperf_command(run: Run) -> list[str]:
    load = (
        ["--concurrency", str(run.streams)]
        if run.streams
        else ["--request-rate", f"{run.rate_per_second:g}", "--request-rate-mode", "poisson"]
    )
    return [
        *(str(run.peers / "aiperf/bin/aiperf"), "profile", "-m", run.model, "--url", run.url),
        *("--endpoint-type", "completions", "--streaming", *load, "--request-count", str(run.request_count)),
        *("--tokenizer", run.tokenizer, "--isl", "32", "--osl", str(run.output_tokens)),
        *("--extra-inputs", "ignore_eos:true", "--artifact-dir", str(run.folder / "aiperf"), "--ui", "none"),
        *("--export-level", "records", "--no-server-metrics", "--no-gpu-telemetry", "--random-seed", "1"),
    ]


def _aiperf_report(run: Run) -> Report:
    path = run.folder / "aiperf/profile_export.jsonl"
    replies = []
    for line in path.read_text().splitlines():
        record = json.loads(line)
        metrics = record["metrics"]
        if "inter_chunk_latency" in metrics:
            replies.append(
                Reply(
                    request_id=record["metadata"]["x_request_id"],
                    ttft_ms=metrics["time_to_first_token"]["value"],
                    gaps_ms=np.array(metrics["inter_chunk_latency"]["value"]),
                )
            )
    return Report(replies=tuple(replies), export_bytes=path.stat().st_size)


# guidellm


def _guidellm_command(run: Run) -> list[str]:
    load = (
        f"kind=concurrent,streams={run.streams}"
        if run.streams
        else f"kind=poisson,rate={run.rate_per_second:g},max_concurrency={run.in_flight_most}"
    )
    return [
        *(str(run.peers / "guidellm/bin/guidellm"), "run", "--profile", load),
        *("--backend", f"kind=openai_http,target={run.url},model={run.model},request_format=/v1/completions"),
        *("--constraint", f"kind=max_duration,seconds={run.seconds:g}"),
        *("--data", f"kind=synthetic_text,prompt_tokens=32,output_tokens={run.output_tokens}"),
        *("--tokenizer", f"kind=huggingface_auto,model={run.tokenizer}"),
        *("--output", f"kind=json,path={run.folder / 'guidellm.json'}", "--disable-console"),
    ]


def _guidellm_report(run: Run) -> Report:
    path = run.folder / "guidellm.json"
    metrics = json.loads(path.read_text())["benchmarks"][0]["metrics"]
    ttft, itl = (metrics[name]["successful"] for name in ("time_to_first_token_ms", "inter_token_latency_ms"))
    return Report(
        ttft_p50_p99_ms=(ttft["percentiles"]["p50"], ttft["percentiles"]["p99"]),
        itl_p50_p99_ms=(itl["percentiles"]["p50"], itl["percentiles"]["p99"]),
        export_bytes=path.stat().st_size,
        note="ITL: means of requests",
    )


def _offline(_: Run) -> dict[str, str]:
    return {"HF_HUB_OFFLINE": "1"}


BARE = Client(name="bare sockets", program="", command=_bare_command, read=_bare_report, can_be_open=False)
CLIENTS = (
    Client(
        name="llm-pilot",
        program="",
        command=_llm_pilot_command,
        read=_llm_pilot_report,
        environment=_llm_pilot_environment,
        part="llmpilot_loadtester.engine.worker",
    ),
    BARE,
    Client(name="vllm bench (Rust)", program="vllm-rs/vllm-rs", command=_vllm_command, read=_vllm_report),
    Client(
        name="Locust HttpUser",
        program="locust/bin/locust",
        command=_locust_command,
        read=_locust_report,
        environment=_locust_environment,
        can_be_open=False,
    ),
    Client(
        name="inference-perf",
        program="inference-perf/bin/inference-perf",
        command=_inference_perf_command,
        read=_inference_perf_report,
        environment=_offline,
    ),
    Client(
        name="guidellm",
        program="guidellm/bin/guidellm",
        command=_guidellm_command,
        read=_guidellm_report,
        environment=_offline,
    ),
    Client(name="aiperf", program="aiperf/bin/aiperf", command=_aiperf_command, read=_aiperf_report),
)
