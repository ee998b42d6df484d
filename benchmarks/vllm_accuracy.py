"""Compares a simulated vLLM 0.19, step times from per-layer profiles and nothing fitted, with real runs of it.

    python benchmarks/vllm_accuracy.py

The runs and the profiles are those of casys-kaist/LLMServingSim. An error is simulated over measured, minus 1.
"""

import csv
import json
import os
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt

from llmpilot_perfmodel.batching.engine import Engine
from llmpilot_perfmodel.batching.policies import Vllm1Policy
from llmpilot_perfmodel.batching.simulation import simulate_arrivals
from llmpilot_perfmodel.bundled_llms import bundled_config
from llmpilot_perfmodel.steps.layer_profile import load_layer_profile
from llmpilot_perfmodel.steps.step_time import StepTables

Floats = npt.NDArray[np.float64]
Integers = npt.NDArray[np.int64]

DATA = Path(os.environ.get("LLMPILOT_DATA", Path(__file__).parents[2] / "shared" / "data"))
PROFILED_GPUS = ("RTX4090", "RTXPRO6000")
PROFILED_LLM = "Llama-3.1-8B"
RESERVED_BLOCKS = 1
"""vLLM V1 gives the first of its blocks to no request."""
UNSTATED_BLOCK_COUNT = 30_000
"""For the RTXPRO6000, whose block count is not stated: its 96 GB never fill, a third of these blocks is used."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Run:
    """The requests of a real server, seconds since the first arrival."""

    policy: Vllm1Policy
    arrival_seconds: Floats
    input_tokens: Integers
    output_tokens: Integers
    first_token_seconds: Floats
    last_token_seconds: Floats


@dataclass(frozen=True, slots=True, kw_only=True)
class ReplayErrors:
    """Of the means over all requests but for the last."""

    ttft: float
    tpot: float
    latency: float
    latency_of_each: float
    """Mean over the requests of their absolute errors."""


def read_run(folder: Path) -> Run:
    """Read a run of LLMServingSim's bench; folder: vllm-run."""
    rows = [json.loads(line) for line in (folder / "requests.jsonl").read_text().splitlines()]
    columns = {name: np.array([row[name] for row in rows]) for name in rows[0] if name != "request_id"}
    # Arrivals are on another clock than the rest; the request that was queued fastest tells how far apart they are.
    start = columns["arrival_time"].min()
    offset = start + (columns["queued_ts"] - columns["arrival_time"]).min()
    meta = json.loads((folder / "meta.json").read_text())
    engine = meta["engine_kwargs"]
    return Run(
        policy=Vllm1Policy(
            block_count=meta.get("kv_cache", {}).get("num_gpu_blocks", UNSTATED_BLOCK_COUNT) - RESERVED_BLOCKS,
            max_num_batched_tokens=engine["max_num_batched_tokens"],
            max_num_seqs=engine["max_num_seqs"],
        ),
        arrival_seconds=columns["arrival_time"] - start,
        input_tokens=columns["input_toks"],
        output_tokens=columns["output_toks"],
        first_token_seconds=columns["first_token_ts"] - offset,
        last_token_seconds=columns["last_token_ts"] - offset,
    )


def run_folder(data: Path, gpu: str) -> Path:
    """Return where a GPU's real run is."""
    return data / "layer-profiles" / gpu / PROFILED_LLM / "vllm-run"


def profiled_tables(data: Path, gpu: str) -> StepTables:
    """Return the step times of the profiled LLM."""
    layers = json.loads(bundled_config(PROFILED_LLM))["num_hidden_layers"]
    return load_layer_profile(data / "layer-profiles" / gpu / PROFILED_LLM / "tp1", layer_count=layers).tables


def replay(run: Run, tables: StepTables) -> ReplayErrors:
    """Send the same requests to a simulated server.

    Which prefixes the real requests shared is not published, so here none do; but a preempted request finds its own
    blocks again, as in vLLM, unless another has taken them.
    """
    block_counts = (run.input_tokens + run.output_tokens) // run.policy.block_size
    starts = np.concatenate([[0], np.cumsum(block_counts)])
    records = simulate_arrivals(
        policy=run.policy,
        tables=tables,
        arrival_seconds=run.arrival_seconds,
        input_tokens=run.input_tokens,
        output_tokens=run.output_tokens,
        block_hashes=np.arange(1, starts[-1] + 1),
        block_hash_starts=starts,
    )
    order = np.argsort(records.request_index)
    first = records.token_seconds[records.token_starts[:-1]][order]
    last = records.end_seconds[order]
    measured, simulated = (
        (first - run.arrival_seconds, (last - first) / (run.output_tokens - 1), last - run.arrival_seconds)
        for first, last in ((run.first_token_seconds, run.last_token_seconds), (first, last))
    )
    ttft, tpot, latency = (
        float(ours.mean() / theirs.mean() - 1) for ours, theirs in zip(simulated, measured, strict=True)
    )
    return ReplayErrors(
        ttft=ttft, tpot=tpot, latency=latency, latency_of_each=float(np.abs(simulated[2] / measured[2] - 1).mean())
    )


def timeline(run: Run, tables: StepTables, ticks: Floats) -> Floats:
    """Return running requests, waiting requests and share of the memory in use, one row each, at the given seconds."""
    engine = Engine(policy=run.policy, tables=tables)
    order = np.argsort(run.arrival_seconds, kind="stable").tolist()
    hashes = np.arange(1, int((run.input_tokens + run.output_tokens).sum()) // run.policy.block_size + 1)
    taken, sent, now = 0, 0, 0.0
    seen = np.zeros((3, len(ticks)))
    while True:
        while sent < len(order) and run.arrival_seconds[order[sent]] <= now:
            index = order[sent]
            lengths = int(run.input_tokens[index]), int(run.output_tokens[index])
            count = sum(lengths) // run.policy.block_size
            engine.submit(
                arrival_seconds=float(run.arrival_seconds[index]),
                input_tokens=lengths[0],
                output_tokens=lengths[1],
                block_hashes=hashes[taken : taken + count],
            )
            taken, sent = taken + count, sent + 1
        end = engine.start_step(now)
        if end is None:
            if sent == len(order):
                return seen
            end = float(run.arrival_seconds[order[sent]])
        state = (engine.running_count, engine.waiting_count, engine.used_memory_share)
        seen[:, (ticks >= now) & (ticks < end)] = np.array(state)[:, None]
        if engine.running_count:
            engine.finish_step()
        now = end


def read_timeseries(folder: Path) -> tuple[Floats, Floats]:
    """Return the ticks of a run, and what `timeline` returns as measured."""
    with (folder / "timeseries.csv").open() as file:
        rows = list(csv.DictReader(file))
    ticks, running, waiting, used = (
        np.array([float(row[name]) for row in rows]) for name in ("t", "running", "waiting", "kv_cache_pct")
    )
    return ticks, np.array([running, waiting, used / 100])


def main() -> None:
    """Print the table."""
    print(f"vLLM 0.19, {PROFILED_LLM}, per-layer profiles, nothing fitted: errors of the means")
    print(f"{'GPU':<12}{'TTFT':>8}{'TPOT':>8}{'latency':>9}{'latency of each request':>25}")
    for gpu in PROFILED_GPUS:
        errors = replay(read_run(run_folder(DATA, gpu)), profiled_tables(DATA, gpu))
        print(
            f"{gpu:<12}{errors.ttft:>+8.1%}{errors.tpot:>+8.1%}{errors.latency:>+9.1%}{errors.latency_of_each:>25.1%}"
        )
    print(f"{'target':<12}{'':>8}{'6 %':>8}{'7 %':>9}")


if __name__ == "__main__":
    main()
