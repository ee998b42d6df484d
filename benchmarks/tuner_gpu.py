"""A tuned weight put to the proof on a GPU: random admissible batches for minutes, then 1.05 times the weight.

An LLM with random weights is tuned at caps that make one large card stand for smaller ones. Then random batches that
the weight admits run in fresh processes for --minutes, none of which may run out of memory; a weight 5 % above must.
Plain binary search is timed on the same corner cases.

Usage: python benchmarks/tuner_gpu.py [--llm meta-llama/Llama-3.1-8B] [--caps 24 40 80] [--minutes 10] [--probe torch]
"""

import argparse
import asyncio
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import numpy as np
from tuning.searches import plain_search, run_batches, tuned

from llmpilot_perfmodel.bundled_llms import bundled_config
from llmpilot_perfmodel.step_memory.batch import Batch
from llmpilot_tuner.domain.corners import corner_batches, sweep_batches
from llmpilot_tuner.domain.limits import Limits
from llmpilot_tuner.domain.plan import Plan, plan_of
from llmpilot_tuner.domain.probing import ProbeKind
from llmpilot_tuner.domain.servers import Server
from llmpilot_tuner.domain.spec import TuningSpec
from llmpilot_tuner.probes.open_probe import open_probe

GB = 10**9
BEYOND = 1.05
BATCHES_AT_ONCE = 50


def random_batches(limits: Limits, weight: int, generator: np.random.Generator) -> Iterator[Batch]:
    """Yield batches that a weight admits: of any smaller weight, and of any smaller number of requests."""
    pool_tokens = corner_batches(limits, weight)[0].pool_tokens
    while True:
        smaller = int(generator.integers(limits.lowest_weight, weight + 1))
        fewer = replace(limits, most_requests=int(generator.integers(1, limits.most_requests + 1)))
        batches = (*corner_batches(fewer, smaller), *sweep_batches(fewer, smaller))
        yield replace(batches[int(generator.integers(len(batches)))], pool_tokens=pool_tokens)


async def proof(plan: Plan, weight: int, minutes: float) -> tuple[int, bool, bool]:
    """Return how many random batches ran, whether all passed, and whether the weight beyond ran out of memory."""
    generator, count, passed = np.random.default_rng(0), 0, True
    source = random_batches(plan.limits, weight, generator)
    async with open_probe(plan) as prober:
        end = time.perf_counter() + 60 * minutes
        while passed and time.perf_counter() < end:
            batches = [next(source) for _ in range(BATCHES_AT_ONCE)]
            passed, ran = await run_batches(prober, batches, soak=True)
            count += ran
        withstood, _ = await run_batches(prober, corner_batches(plan.limits, int(BEYOND * weight)))
    return count, passed, not withstood


async def measure(arguments: argparse.Namespace) -> None:
    """Print a row for each cap."""
    print("| cap GB | weight | probes | s | plain: probes | s | random batches | all passed | 1.05 x fails |")
    print("|---|---|---|---|---|---|---|---|---|")
    for cap in arguments.caps:
        spec = TuningSpec(
            config_json=arguments.config_json,
            llm_name=arguments.llm,
            probe=ProbeKind(arguments.probe),
            server=Server(arguments.server),
            gpu_memory_bytes=round(cap * GB),
            reserved_bytes=round(arguments.reserve * GB),
            longest_sequence=arguments.longest_sequence,
            most_new_tokens=arguments.longest_sequence // 2,
            most_requests=256,
        )
        started = time.perf_counter()
        result = await tuned(spec)
        seconds = time.perf_counter() - started
        plan = plan_of(spec)
        plain = await plain_search(plan)
        count, passed, breaks = await proof(plan, result.max_batch_weight, arguments.minutes)
        print(
            f"| {cap:g} | {result.max_batch_weight:,} | {len(result.probes)} | {seconds:.1f} | {plain.probe_count} | "
            f"{plain.seconds:.1f} | {count:,} | {passed} | {breaks} |",
            flush=True,
        )


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--llm", default="meta-llama/Llama-3.1-8B", help="a bundled LLM or a config.json")
    parser.add_argument("--caps", type=float, nargs="+", default=[24, 40, 80])
    parser.add_argument("--reserve", type=float, default=1.0, help="GB set aside for context and kernels")
    parser.add_argument("--minutes", type=float, default=10)
    parser.add_argument("--longest-sequence", type=int, default=4096)
    parser.add_argument("--server", choices=list(Server), default=Server.TGI)
    parser.add_argument("--probe", choices=[ProbeKind.TORCH, ProbeKind.CPU], default=ProbeKind.TORCH)
    arguments = parser.parse_args()
    path = Path(arguments.llm)
    arguments.config_json = path.read_text() if path.is_file() else bundled_config(arguments.llm)
    asyncio.run(measure(arguments))


if __name__ == "__main__":
    main()
