"""Times drawing requests from the published workload model (fmperf, 46,526 cells, seven parameters).

    python benchmarks/workload_sampling.py [--data FOLDER] [--repeats N]

A sample of 1,000 requests: the original's algorithm, re-created from its description (np.random.choice with the
probabilities as a list, then rows of an object array of tuples that is rebuilt in each call); random rows of a trace
kept as numpy columns; ours, as values of all seven parameters and as records of their bins.
10^8 requests: random numbers that are only stored are the floor. In one go, into memory that the process gets for it;
and in blocks that stay in the cache, as a stream is drawn. One core; the best of several calls after one to warm up.
"""

import argparse
import os
import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import numpy as np

from llmpilot_workload_generator.imports.model_import import import_model
from llmpilot_workload_generator.model import WorkloadModel, bin_centres
from llmpilot_workload_generator.sampling import drawing
from llmpilot_workload_generator.sampling.alias import build_alias
from llmpilot_workload_generator.sampling.sampler import SampleOptions, Sampler, ValueChoice

SAMPLE = 1_000
TRACE_ROWS = 17_300_000
MANY = 100_000_000
BLOCK = 65_536
LEAST_SECONDS = 0.05
"""Short calls are repeated so often that they take about this long together."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Timing:
    """How long a call takes."""

    best_seconds: float
    median_seconds: float


def timing_of(call: Callable[[], object], repeats: int) -> Timing:
    """Return how long a call takes, after one call to warm up."""
    call()
    started = time.perf_counter()
    call()
    calls = max(1, int(LEAST_SECONDS / (time.perf_counter() - started)))
    taken = []
    for _ in range(repeats):
        started = time.perf_counter()
        for _ in range(calls):
            call()
        taken.append((time.perf_counter() - started) / calls)
    return Timing(best_seconds=min(taken), median_seconds=float(np.median(taken)))


def original(model: WorkloadModel) -> Callable[[], object]:
    """Return the original's algorithm: every cell is a tuple of labels with a probability."""
    labels = [
        bin_centres(parameter)[codes].tolist() for parameter, codes in zip(model.parameters, model.codes, strict=True)
    ]
    cells = list(zip(*labels, strict=True))
    shares = (model.counts / model.request_count).tolist()

    def draw() -> object:
        chosen = np.random.choice(range(len(shares)), SAMPLE, p=shares)
        return np.array(cells, dtype=object)[chosen]

    return draw


def trace_rows(sampler: Sampler) -> Callable[[], object]:
    """Return drawing random rows of a trace that is kept as columns."""
    columns = list(sampler.draw(0, TRACE_ROWS).columns.values())
    generator = np.random.default_rng(0)

    def draw() -> object:
        rows = generator.integers(0, TRACE_ROWS, SAMPLE)
        return [column.take(rows) for column in columns]

    return draw


def print_small(model: WorkloadModel, repeats: int) -> None:
    """Print what a sample of 1,000 requests takes."""
    sampler = Sampler(model, SampleOptions())
    calls: dict[str, Callable[[], object]] = {
        "original's algorithm": original(model),
        f"random rows of {TRACE_ROWS / 1e6:.1f} M, numpy": trace_rows(sampler),
        "ours, values (centres)": lambda: sampler.draw(0, SAMPLE),
        "ours, records": lambda: sampler.draw_records(0, SAMPLE),
    }
    others = {
        "values by quantiles": SampleOptions(value_choice=ValueChoice.QUANTILES),
        "values, uniform": SampleOptions(value_choice=ValueChoice.UNIFORM),
        "values, independent": SampleOptions(independent=True),
        "values, input <= 874": SampleOptions(conditions=("input_tokens <= 874",)),
    }
    for name, options in others.items():
        other = Sampler(model, options)
        calls[f"ours, {name}"] = partial(other.draw, 0, SAMPLE)
    timings = {name: timing_of(call, repeats) for name, call in calls.items()}
    first, second = (timing.best_seconds for timing in list(timings.values())[:2])
    print(f"\n{SAMPLE:,} requests")
    print(f"{'':<34}{'best ms':>10}{'median ms':>11}{'x original':>12}{'x trace rows':>14}")
    for name, timing in timings.items():
        best, median = timing.best_seconds, timing.median_seconds
        ratios = f"{first / best:>12,.0f}{second / best:>14,.1f}"
        print(f"{name:<34}{best * 1e3:>10.4f}{median * 1e3:>11.4f}{ratios}")
    print("target: at most .01 ms, 1000 times the original, 15 times the rows of a trace")


def print_many(model: WorkloadModel, repeats: int) -> None:
    """Print what 10^8 requests take."""
    sampler = Sampler(model, SampleOptions())
    key, block = np.uint64(0), np.empty(BLOCK, np.uint64)

    def floor_at_once() -> None:
        drawing.draw_numbers(key, np.uint64(0), np.empty(MANY, np.uint64))

    def floor_in_blocks() -> None:
        for start in range(0, MANY, BLOCK):
            drawing.draw_numbers(key, np.uint64(start), block[: MANY - start])

    def in_blocks(draw: Callable[[int, int], object]) -> None:
        for start in range(0, MANY, BLOCK):
            draw(start, min(BLOCK, MANY - start))

    groups: dict[str, dict[str, Callable[[], object]]] = {
        "in one go": {"RNG + store": floor_at_once, "ours, records": lambda: sampler.draw_records(0, MANY)},
        f"in blocks of {BLOCK:,}": {
            "RNG + store": floor_in_blocks,
            "ours, records": lambda: in_blocks(sampler.draw_records),
            "ours, values, seven columns": lambda: in_blocks(sampler.draw),
        },
    }
    print(f"\n{MANY:,} requests")
    print(f"{'':<22}{'':<30}{'best s':>8}{'median s':>10}{'requests/s':>14}{'x floor':>9}")
    for group, calls in groups.items():
        floor = 0.0
        for name, call in calls.items():
            timing = timing_of(call, repeats)
            floor = floor or timing.best_seconds
            print(
                f"{group:<22}{name:<30}{timing.best_seconds:>8.3f}{timing.median_seconds:>10.3f}"
                f"{MANY / timing.best_seconds:>14.3g}{timing.best_seconds / floor:>9.1f}"
            )
    print("target: at most 3 times the floor, and at least 2e8 requests/s")


def main() -> None:
    """Print the tables."""
    data = os.environ.get("LLMPILOT_DATA", Path(__file__).parents[2] / "shared" / "data")
    parser = argparse.ArgumentParser()
    parser.add_argument("--data", type=Path, default=data)
    parser.add_argument("--repeats", type=int, default=7)
    arguments = parser.parse_args()
    os.sched_setaffinity(0, {min(os.sched_getaffinity(0))})
    model = import_model(arguments.data / "fmperf" / "all_nbins_64.pkl")
    print(f"{model.request_count:,} requests in {len(model.keys):,} cells; one core")
    timing = timing_of(lambda: build_alias(model.counts), arguments.repeats)
    print(f"alias table: best {timing.best_seconds * 1e3:.2f} ms")
    timing = timing_of(lambda: Sampler(model, SampleOptions()), arguments.repeats)
    print(f"making a sampler: best {timing.best_seconds * 1e3:.2f} ms")
    print_small(model, arguments.repeats)
    print_many(model, arguments.repeats)


if __name__ == "__main__":
    main()
