"""Simulates the correlation experiment of Lazuka et al., 2024 (V-A): joint requests against independent ones.

    python benchmarks/workload_correlation.py [--profile NAME]

Llama-2-13b on one A100 80GB under TGIS, 1 to 128 users for 120 simulated seconds: requests of the profile's joint
model, and of its marginals drawn independently. A user sends all prompts of a batch at once, and the next request when
the last reply is complete; beside that, as if every request had one prompt. The paper measured, this is simulated.
"""

import argparse
import heapq
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from llmpilot_perfmodel.batching.engine import Engine
from llmpilot_simulator.deployment import Deployment, DeploymentRequest, deploy
from llmpilot_workload_generator.model import BATCH_SIZE, INPUT_TOKENS, OUTPUT_TOKENS
from llmpilot_workload_generator.profiles import load_profile
from llmpilot_workload_generator.sampling.sampler import SampleOptions, Sampler

USERS_COUNTS = (1, 2, 4, 8, 16, 32, 64, 128)
REQUESTS = 50_000
TEST_SECONDS = 120.0
CONTEXT_LENGTH = 4096
PAPER = (-13.0, 30.0, -25.0)
"""Mean over the users, measured, in percent: throughput, median TTFT, median ITL."""

Requests = tuple[npt.NDArray[np.int64], npt.NDArray[np.int64], npt.NDArray[np.int64]]
"""Input tokens, output tokens and prompts of every request."""


@dataclass(slots=True)
class Prompt:
    """A prompt in the server."""

    user: int
    sent_seconds: float
    last_seconds: float | None = None


@dataclass(frozen=True, slots=True)
class Seen:
    """What users saw under one load."""

    tokens_per_second: float
    ttft_seconds: float
    itl_seconds: float


def requests_of(profile: str, *, independent: bool, with_batches: bool) -> Requests:
    """Draw requests."""
    options = SampleOptions(seed=1, independent=independent, context_length=CONTEXT_LENGTH)
    columns = Sampler(load_profile(profile), options).draw(0, REQUESTS).columns
    prompts = columns[BATCH_SIZE] if with_batches and BATCH_SIZE in columns else np.ones(REQUESTS)
    inputs, outputs, counts = (
        np.asarray(column).astype(np.int64) for column in (columns[INPUT_TOKENS], columns[OUTPUT_TOKENS], prompts)
    )
    return inputs, outputs, counts


def simulated(deployment: Deployment, requests: Requests, users_count: int) -> Seen:
    """Run one load test on the scheduler itself, step by step."""
    engine = Engine(policy=deployment.policy, tables=deployment.step_constants.tables())
    inputs, outputs, counts = requests
    inside: dict[int, Prompt] = {}
    open_prompts = [0] * users_count
    ttft, itl = [], []
    token_count = order = 0
    due = [(0.0, user) for user in range(users_count)]
    now = 0.0
    while now < TEST_SECONDS:
        while due and due[0][0] <= now:
            sent, user = heapq.heappop(due)
            request, order = order % REQUESTS, order + 1
            open_prompts[user] = int(counts[request])
            for _ in range(open_prompts[user]):
                slot = engine.submit(
                    arrival_seconds=sent, input_tokens=int(inputs[request]), output_tokens=int(outputs[request])
                )
                inside[slot] = Prompt(user, sent)
        end = engine.start_step(now)
        if end is None or end > TEST_SECONDS:
            break
        now, outcome = end, engine.finish_step()
        for slot in outcome.token_slots.tolist():
            prompt = inside[slot]
            if prompt.last_seconds is None:
                ttft.append(now - prompt.sent_seconds)
            else:
                itl.append(now - prompt.last_seconds)
            prompt.last_seconds = now
        token_count += len(outcome.token_slots)
        for slot in outcome.finished_slots.tolist():
            user = inside.pop(slot).user
            open_prompts[user] -= 1
            if not open_prompts[user]:
                heapq.heappush(due, (now, user))
    return Seen(token_count / TEST_SECONDS, float(np.median(ttft)), float(np.median(itl)))


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
    for with_batches in (True, False):
        title = "batches sent whole" if with_batches else "one prompt a request"
        print(f"\nindependent against joint, simulated, percent; {title}")
        print(f"{'users':>6}{'throughput':>12}{'TTFT':>8}{'ITL':>8}")
        joint, independent = (
            requests_of(profile, independent=mode, with_batches=with_batches) for mode in (False, True)
        )
        rows = []
        for users_count in USERS_COUNTS:
            ours, theirs = (simulated(deployment, requests, users_count) for requests in (joint, independent))
            rows.append(differences(ours, theirs))
            print(line(str(users_count), rows[-1]))
        print(line("mean", tuple(np.mean(rows, axis=0))))
        print(line("paper", PAPER))


def differences(joint: Seen, independent: Seen) -> tuple[float, ...]:
    """Return by how many percent throughput, median TTFT and median ITL differ."""
    pairs = (
        (joint.tokens_per_second, independent.tokens_per_second),
        (joint.ttft_seconds, independent.ttft_seconds),
        (joint.itl_seconds, independent.itl_seconds),
    )
    return tuple(100 * (theirs / ours - 1) for ours, theirs in pairs)


def line(title: str, values: tuple[float, ...]) -> str:
    """Return a line of the table."""
    return f"{title:>6}" + "".join(f"{value:>+{width}.1f}" for value, width in zip(values, (12, 8, 8), strict=True))


if __name__ == "__main__":
    main()
