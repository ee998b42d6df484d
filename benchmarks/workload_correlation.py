"""Simulates the correlation experiment of Lazuka et al., 2024 (V-A): joint requests against independent ones.

    python benchmarks/workload_correlation.py [--profile NAME]

Llama-2-13b on one A100 80GB under TGIS, 1 to 128 users for 120 simulated seconds: requests of the profile's joint
model, and of its marginals drawn independently; with one prompt a request, and with the prompts of a batch one after
another, as simulated users send one prompt at a time. The paper measured, and its users sent batches whole.
"""

import argparse

import numpy as np
import numpy.typing as npt

from llmpilot_perfmodel.batching.simulation import simulate_users
from llmpilot_simulator.deployment import Deployment, DeploymentRequest, deploy
from llmpilot_simulator.ladder import Level, level
from llmpilot_workload_generator.model import BATCH_SIZE, INPUT_TOKENS, OUTPUT_TOKENS
from llmpilot_workload_generator.profiles import load_profile
from llmpilot_workload_generator.sampling.sampler import SampleOptions, Sampler

USERS_COUNTS = (1, 2, 4, 8, 16, 32, 64, 128)
REQUESTS = 50_000
TEST_SECONDS = 120.0
PAPER = (-13.0, 30.0, -25.0)
"""Mean over the users, measured, in percent: throughput, median TTFT, median ITL."""


def sequences(
    profile: str, *, independent: bool, with_batches: bool, context_length: int
) -> tuple[npt.NDArray[np.int64], ...]:
    """Return input and output tokens of single prompts."""
    options = SampleOptions(seed=1, independent=independent, context_length=context_length)
    columns = Sampler(load_profile(profile), options).draw(0, REQUESTS).columns
    batch_sizes = columns[BATCH_SIZE] if with_batches and BATCH_SIZE in columns else np.ones(REQUESTS)
    return tuple(
        np.repeat(columns[name], batch_sizes.astype(np.int64)).astype(np.int64)
        for name in (INPUT_TOKENS, OUTPUT_TOKENS)
    )


def simulated(deployment: Deployment, lengths: tuple[npt.NDArray[np.int64], ...], users_count: int) -> Level:
    """Run one load test."""
    records = simulate_users(
        policy=deployment.policy,
        tables=deployment.step_constants.tables(),
        input_tokens=lengths[0],
        output_tokens=lengths[1],
        users_count=users_count,
        duration_seconds=TEST_SECONDS,
        seed=np.random.default_rng([1, users_count]),
        out_of_memory_tokens=deployment.out_of_memory_tokens,
    )
    return level(users_count, records)


def main() -> None:
    """Print how much worse or better independent requests look, by users."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--profile", default="production")
    profile = parser.parse_args().profile
    deployment = deploy(
        DeploymentRequest(
            llm="llama-2-13b",
            gpu_profile="1xA100-80GB",
            policy="tgis",
            max_batch_weight=None,
            precision=None,
            gpus=None,
        )
    )
    for with_batches in (False, True):
        title = "prompts of a batch one after another" if with_batches else "one prompt a request"
        print(f"\nindependent against joint, simulated, percent; {title}")
        print(f"{'users':>6}{'throughput':>12}{'TTFT':>8}{'ITL':>8}")
        joint, independent = (
            sequences(profile, independent=mode, with_batches=with_batches, context_length=4096)
            for mode in (False, True)
        )
        rows = []
        for users_count in USERS_COUNTS:
            ours, theirs = (simulated(deployment, lengths, users_count) for lengths in (joint, independent))
            rows.append(differences(ours, theirs))
            print(line(str(users_count), rows[-1]))
        print(line("mean", tuple(np.mean(rows, axis=0))))
        print(line("paper", PAPER))


def differences(joint: Level, independent: Level) -> tuple[float, ...]:
    """Return by how many percent throughput, median TTFT and median ITL differ."""
    pairs = (
        (joint.tokens_per_second, independent.tokens_per_second),
        (joint.ttft_ms_median or np.nan, independent.ttft_ms_median or np.nan),
        (joint.itl_ms_median or np.nan, independent.itl_ms_median or np.nan),
    )
    return tuple(100 * (theirs / ours - 1) for ours, theirs in pairs)


def line(title: str, values: tuple[float, ...]) -> str:
    """Return a line of the table."""
    return f"{title:>6}" + "".join(f"{value:>+{width}.1f}" for value, width in zip(values, (12, 8, 8), strict=True))


if __name__ == "__main__":
    main()
