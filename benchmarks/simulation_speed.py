"""Times the simulator of continuous batching: simulated seconds per CPU second, a real-time step, the whole command.

    python benchmarks/simulation_speed.py [--repeats N] [--vidur PYTHON]

With a Python that has vidur (peers/simulation_speed_vidur.py says how), vidur serves the same requests in the same run.
Llama-13b on an A100 40GB (constants fitted on the public records), requests of about 120 input and 19 output tokens.
"""

import argparse
import json
import os
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import asdict
from functools import partial
from pathlib import Path

import numpy as np
import numpy.typing as npt

from llmpilot_perfmodel.batching.engine import Engine
from llmpilot_perfmodel.batching.policies import Policy, TgiPolicy, TgisPolicy, Vllm0Policy, Vllm1Policy
from llmpilot_perfmodel.batching.records import RequestRecords
from llmpilot_perfmodel.batching.simulation import simulate_arrivals, simulate_users
from llmpilot_perfmodel.steps.step_time import StepConstants

LEAST_SECONDS = 0.2
"""Each measured call simulates so much that it takes about this long."""
USERS_COUNTS = (1, 2, 4, 8, 16, 32, 64, 128)
CAMPAIGN_RUNS = 526
TEST_SECONDS = 120.0
ENGINE_SEQUENCES = 512
COMMAND = ("simulate", "run", "--llm", "llama-2-13b", "--gpu", "1xA100-40GB")
VIDUR_REQUESTS = 2000
ARRIVAL_RATES = (1.0, 4.0, 16.0)

CONSTANTS = StepConstants(
    decode_seconds=22.61e-3,
    decode_seconds_per_sequence=0.588e-3,
    decode_seconds_per_cached_token=0.0026e-3,
    prefill_seconds=20.8e-3,
    prefill_seconds_per_token=0.114e-3,
    prefill_seconds_per_request=7.6e-3,
)
TABLES = CONSTANTS.tables()
POLICIES: dict[str, Policy] = {
    "TGIS": TgisPolicy(max_batch_weight=12_000),
    "TGIS padded": TgisPolicy(max_batch_weight=20_000_000, is_padded=True),
    "TGI": TgiPolicy(max_batch_total_tokens=12_000),
    "vLLM 0.2": Vllm0Policy(block_count=750),
    "vLLM V1": Vllm1Policy(block_count=750),
}


def lengths(generator: np.random.Generator, mean: float, most: int) -> npt.NDArray[np.int64]:
    """Return 1,000 lognormal lengths."""
    sigma = 0.9
    drawn = generator.lognormal(np.log(mean) - sigma**2 / 2, sigma, 1000)
    return np.clip(np.rint(drawn), 1, most).astype(np.int64)


GENERATOR = np.random.default_rng(0)
INPUT_TOKENS, OUTPUT_TOKENS = lengths(GENERATOR, 125, 874), lengths(GENERATOR, 19.5, 381)


def simulate(policy: Policy, users_count: int, duration_seconds: float, seed: int) -> RequestRecords:
    """Run one load test."""
    return simulate_users(
        policy=policy,
        tables=TABLES,
        input_tokens=INPUT_TOKENS,
        output_tokens=OUTPUT_TOKENS,
        users_count=users_count,
        duration_seconds=duration_seconds,
        seed=seed,
    )


def seconds_of(call: Callable[[], object]) -> float:
    """Return the CPU time of a call, which others on the machine do not stretch."""
    started = time.process_time()
    call()
    return time.process_time() - started


def simulated_per_second(policy: Policy, users_count: int, repeats: int) -> tuple[float, float]:
    """Return the best and the median simulated seconds per second."""
    duration = TEST_SECONDS
    while (taken := seconds_of(partial(simulate, policy, users_count, duration, 0))) < LEAST_SECONDS:
        duration *= max(2.0, min(16.0, LEAST_SECONDS / taken))
    rates = [duration / seconds_of(partial(simulate, policy, users_count, duration, seed)) for seed in range(repeats)]
    return max(rates), float(np.median(rates))


def engine_step_micros(policy: Policy) -> tuple[float, float]:
    """Return the median and the 99th percentile of a decode step of many sequences, both calls together."""
    engine = Engine(policy=policy, tables=TABLES)
    for _ in range(ENGINE_SEQUENCES):
        engine.submit(arrival_seconds=0.0, input_tokens=64, output_tokens=1000)
    taken: list[float] = []
    now = 0.0
    for _ in range(900):
        started = time.perf_counter()
        end = engine.start_step(now)
        engine.finish_step()
        taken.append((time.perf_counter() - started) * 1e6)
        now = end or now
    decodes = taken[100:]
    return float(np.median(decodes)), float(np.percentile(decodes, 99))


def compare_with_vidur(python: str) -> None:
    """Print both simulators' speed on the same Poisson arrivals under the policy of vLLM 0.2."""
    policy = Vllm0Policy(block_count=750, max_num_batched_tokens=4096, max_num_seqs=128)
    step = asdict(CONSTANTS)
    names = ("decode", "per_sequence", "per_cached_token", "prefill", "per_token", "per_request")
    print(f"\nPoisson arrivals, {VIDUR_REQUESTS} requests, vLLM 0.2: simulated seconds per CPU second")
    print(f"{'requests/s':<12}{'ours':>12}{'vidur':>12}{'ratio':>10}{'ours ends at':>16}{'vidur ends at':>16}")
    for rate in ARRIVAL_RATES:
        generator = np.random.default_rng(0)
        arrivals = np.cumsum(generator.exponential(1 / rate, VIDUR_REQUESTS))
        inputs, outputs = (
            generator.choice(INPUT_TOKENS, VIDUR_REQUESTS),
            generator.choice(OUTPUT_TOKENS, VIDUR_REQUESTS),
        )
        inputs = np.maximum(inputs, 2)  # vidur takes a prompt of one token for a decode
        job = {
            "requests": np.column_stack([arrivals, inputs, outputs]).tolist(),
            "milliseconds": {name: 1e3 * seconds for name, seconds in zip(names, step.values(), strict=False)},
            "max_tokens_in_batch": policy.max_num_batched_tokens,
            "max_sequences": policy.max_num_seqs,
            "block_count": policy.block_count,
            "block_size": policy.block_size,
        }
        answer = subprocess.run(
            [python, str(Path(__file__).parent / "peers" / "simulation_speed_vidur.py")],
            input=json.dumps(job),
            capture_output=True,
            text=True,
            check=True,
        )
        theirs = json.loads(answer.stdout.splitlines()[-1])
        run = partial(
            simulate_arrivals,
            policy=policy,
            tables=TABLES,
            arrival_seconds=arrivals,
            input_tokens=inputs,
            output_tokens=outputs,
        )
        end = run().duration_seconds
        our_rate = end / min(seconds_of(run) for _ in range(5))
        their_rate = theirs["simulated_seconds"] / theirs["cpu_seconds"]
        print(
            f"{rate:<12g}{our_rate:>12,.0f}{their_rate:>12,.0f}{our_rate / their_rate:>10,.0f}"
            f"{end:>16.1f}{theirs['simulated_seconds']:>16.1f}"
        )


def command_seconds() -> float:
    """Return the seconds from the command to its last line, curves included."""
    start = time.perf_counter()
    subprocess.run([Path(sys.executable).with_name("llm-pilot"), *COMMAND], check=True, capture_output=True)
    return time.perf_counter() - start


def main() -> None:
    """Print the tables."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--vidur", metavar="PYTHON")
    arguments = parser.parse_args()
    repeats: int = arguments.repeats
    os.sched_setaffinity(0, {min(os.sched_getaffinity(0))})
    print(f"requests: mean {INPUT_TOKENS.mean():.0f} input, {OUTPUT_TOKENS.mean():.1f} output tokens; one core")
    first = seconds_of(partial(simulate, POLICIES["TGIS"], 1, 1.0, 0))
    print(f"first simulation, with compilation where nothing is kept from an earlier run: {first:.1f} CPU s")

    print(f"\nsimulated seconds per CPU second, best (median) of {repeats}")
    print(f"{'users':<6}" + "".join(f"{name:>22}" for name in POLICIES))
    for users_count in USERS_COUNTS:
        rates = [simulated_per_second(policy, users_count, repeats) for policy in POLICIES.values()]
        print(f"{users_count:<6}" + "".join(f"{f'{best:,.0f} ({median:,.0f})':>22}" for best, median in rates))

    def campaign() -> None:
        for run in range(CAMPAIGN_RUNS):
            simulate(POLICIES["TGIS"], USERS_COUNTS[run % len(USERS_COUNTS)], TEST_SECONDS, run).summary()

    best = min(seconds_of(campaign) for _ in range(3))
    print(f"\n{CAMPAIGN_RUNS} load tests of {TEST_SECONDS:.0f} s with their metrics: {best:.2f} CPU s")

    walls = sorted(command_seconds() for _ in range(2 * repeats))
    print(f"\nllm-pilot {' '.join(COMMAND)}: {walls[0]:.2f} to {walls[-1]:.2f} s")

    print(f"\nengine, a decode step of {ENGINE_SEQUENCES} sequences: median (p99) us")
    roomy: dict[str, Policy] = {
        "TGIS": TgisPolicy(max_batch_weight=10**7, max_batch_size=ENGINE_SEQUENCES),
        "TGIS padded": TgisPolicy(max_batch_weight=10**11, max_batch_size=ENGINE_SEQUENCES, is_padded=True),
        "TGI": TgiPolicy(max_batch_total_tokens=10**7, max_batch_prefill_tokens=10**6),
        "vLLM 0.2": Vllm0Policy(block_count=10**5, max_num_seqs=ENGINE_SEQUENCES),
        "vLLM V1": Vllm1Policy(block_count=10**5, max_num_seqs=ENGINE_SEQUENCES),
    }
    for name, policy in roomy.items():
        median, p99 = engine_step_micros(policy)
        print(f"{name:<12}{median:8.1f} ({p99:.1f})")
    if arguments.vidur:
        compare_with_vidur(arguments.vidur)


if __name__ == "__main__":
    main()
