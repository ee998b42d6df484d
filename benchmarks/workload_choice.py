"""Compares a simulated vLLM 0.2 on an A100 40GB with the offline runs of Papaioannou and Doudali, EuroMLSys '24.

    python benchmarks/workload_choice.py [--fit] [--online]

Step times come from physics and three constants that were fitted on Llama-2-13b with 150 and 600 blocks; --fit fits
them again and prints them. --online adds the study's other half with the same constants: the largest rate
of requests that a server stands. An error is simulated over measured, minus 1.
"""

import csv
import os
import sys
from collections.abc import Iterator
from dataclasses import dataclass, fields, replace
from functools import cache
from pathlib import Path

import numpy as np
import numpy.typing as npt

from llmpilot_perfmodel.batching.policies import Vllm0Policy
from llmpilot_perfmodel.batching.simulation import simulate_arrivals
from llmpilot_perfmodel.gpu_catalogue import load_catalogue
from llmpilot_perfmodel.steps.step_time import StepConstants, StepTables

Floats = npt.NDArray[np.float64]
Integers = npt.NDArray[np.int64]

DATA = Path(os.environ.get("LLMPILOT_DATA", Path(__file__).parents[2] / "shared" / "data"))
USE_CASES = {"alpaca": "alpaca", "cnn_dailymail": "cnn", "dolly": "dolly", "sharegpt": "sharegpt"}
"""By their names in offline.csv, those in token_length_cdf.csv."""
LONG_INPUTS = "cnn_dailymail"
FAMILIES = ("opt", "llama2")
"""By tokenizer, first that of the published distributions."""
LARGEST_RUN = 1000
REQUEST_COUNTS = (100, 500, 1000)
FITTED_COUNTS = (500, 1000)
"""A run of 100 ends with its longest request: samples of 100 from one distribution differ by up to a fifth."""
MAX_TOKENS = 2048
SAMPLES = 8
"""Simulated samples of the requests of each real run."""
LARGE_SAMPLE = 100_000
TARGETS = {"llama2-13b": 0.07, "opt-13b": 0.08, "llama2-7b": 0.13, "opt-6.7b": 0.13}


@dataclass(frozen=True, slots=True, kw_only=True)
class Llm:
    """What the step time of an LLM depends on; parameter counts from the model cards."""

    parameter_count: int
    layer_count: int
    hidden_size: int


LLMS = {
    "llama2-13b": Llm(parameter_count=13_015_864_320, layer_count=40, hidden_size=5120),
    "llama2-7b": Llm(parameter_count=6_738_415_616, layer_count=32, hidden_size=4096),
    "opt-13b": Llm(parameter_count=12_853_473_280, layer_count=40, hidden_size=5120),
    "opt-6.7b": Llm(parameter_count=6_658_473_984, layer_count=32, hidden_size=4096),
}
FITTED_LLM = "llama2-13b"
FITTED_BLOCKS = (150, 600)
ONLINE_SECONDS = 600
LARGEST_P95 = 0.1875
"""Seconds from a request's arrival to its end per output token, the study's limit."""
RATE_SEARCH_STEPS = 10
LEAST_MEASURED_RATE = 0.6
"""Below, the measured p95 crosses the limit several times, both ways."""
FIT_FACTORS = (1.6, 1.25, 1.1, 1.04, 1.015)
BYTES_PER_VALUE = 2


@dataclass(frozen=True, slots=True, kw_only=True)
class Fit:
    """The three constants; the rest of a step's time is physics."""

    overhead_seconds_per_layer: float
    """What a step takes besides reading the weights once."""
    seconds_per_sequence: float
    """Sampling and scheduling, whatever the LLM."""
    compute_share: float
    """Of the peak FLOPs, in a prefill."""

    def tables(self, llm: Llm) -> StepTables:
        """Return the step times on an A100 40GB."""
        gpu = load_catalogue().require("1xA100-40GB").gpu
        bandwidth = gpu.memory_bandwidth_bytes_per_second
        weights_seconds = BYTES_PER_VALUE * llm.parameter_count / bandwidth
        base = weights_seconds + self.overhead_seconds_per_layer * llm.layer_count
        cached_bytes = 2 * llm.layer_count * llm.hidden_size * BYTES_PER_VALUE
        assert gpu.tensor_fp16_tflops is not None  # noqa: S101 the catalogue states it
        flops = gpu.tensor_fp16_tflops * 1e12 * self.compute_share
        return StepConstants(
            decode_seconds=base,
            decode_seconds_per_sequence=self.seconds_per_sequence,
            decode_seconds_per_cached_token=cached_bytes / bandwidth,
            prefill_seconds=base,
            prefill_seconds_per_token=2 * llm.parameter_count / flops,
            prefill_seconds_per_request=0.0,
        ).tables()


FIT = Fit(overhead_seconds_per_layer=4.26e-5, seconds_per_sequence=5.6e-5, compute_share=0.46)
"""What `python benchmarks/workload_choice.py --fit` found, rounded; a start far away leads to the same errors."""
FIT_START = Fit(overhead_seconds_per_layer=1.2e-4, seconds_per_sequence=1e-4, compute_share=0.6)
"""As read from TGIS's steps in the raw records of Lazuka et al., 2024."""


@dataclass(frozen=True, slots=True, kw_only=True)
class OfflineRun:
    """Requests that were all sent at once."""

    llm: str
    use_case: str
    block_count: int
    request_count: int
    requests_per_second: float
    tokens_per_second: float


def policy_of(block_count: int) -> Vllm0Policy:
    """Return the study's settings."""
    return Vllm0Policy(block_count=block_count, max_num_batched_tokens=2560, max_num_seqs=2048, max_paddings=256)


def measured_rates(path: Path) -> dict[tuple[str, str, int], float]:
    """Return the largest rate of each server: the last before two in a row are beyond the limit, as in the study."""
    points: dict[tuple[str, str, int], list[tuple[float, float]]] = {}
    with path.open() as file:
        for row in csv.DictReader(file):
            server = row["model"], row["use_case"], int(row["total_blocks"])
            points.setdefault(server, []).append((float(row["request_rate"]), float(row["p95"])))
    rates = {}
    for server, measured in points.items():
        rates[server], beyond = 0.0, 0
        for rate, p95 in sorted(measured):
            beyond = beyond + 1 if p95 > LARGEST_P95 else 0
            if beyond == 2:
                break
            if beyond == 0:
                rates[server] = rate
    return rates


class WorkloadChoice:
    """The published runs, and requests like theirs.

    The study's own benchmark (muse-research-lab/vllm, benchmarks/trace.py) drops requests with 2048 tokens or more and
    lets the LLM end an output before it is as long as in the data set: here some outputs are as long as there, and the
    others end anywhere before. How many follows from the tokens per request of each run; only in summarization, where
    nine tenths of them are inputs, are outputs shortened as in the median of the other use cases, and the inputs make
    up the difference.
    """

    def __init__(self, folder: Path) -> None:
        with (folder / "offline.csv").open() as file:
            self.runs = [
                OfflineRun(
                    llm=row["model"],
                    use_case=row["use_case"],
                    block_count=int(row["total_blocks"]),
                    request_count=int(row["num_requests"]),
                    requests_per_second=float(row["requests_per_second"]),
                    tokens_per_second=float(row["tokens_per_second"]),
                )
                for row in csv.DictReader(file)
            ]
        with (folder / "token_length_cdf.csv").open() as file:
            rows = list(csv.DictReader(file))
        self._quantiles = {
            (use_case, side): np.array(
                [
                    (float(row["cdf"]), float(row["tokens"]))
                    for row in rows
                    if row["use_case"] == name and row["side"] == side
                ]
            ).T
            for use_case, name in USE_CASES.items()
            for side in ("input", "output")
        }
        # Nearly all tokens of the summarization runs are inputs, so their ratio is that of the tokenizers.
        longest = [self._tokens_per_request(family, LONG_INPUTS, LARGEST_RUN) for family in FAMILIES]
        self._tokenizers = {family: tokens / longest[0] for family, tokens in zip(FAMILIES, longest, strict=True)}
        self._scales = self._length_scales()
        self.requests = cache(self._requests)

    def _tokens_per_request(self, llm: str, use_case: str, request_count: int) -> float:
        """Return the mean over the runs of an LLM or of a family; a fact of the workload, not of the server."""
        return float(
            np.mean(
                [
                    run.tokens_per_second / run.requests_per_second
                    for run in self.runs
                    if (run.llm.startswith(llm), run.use_case, run.request_count) == (True, use_case, request_count)
                ]
            )
        )

    def _length_scales(self) -> dict[tuple[str, str], tuple[float, float]]:
        """Return by family and use case what inputs are multiplied with, and what share of the outputs comes."""
        scales, means = {}, {}
        for family in FAMILIES:
            for use_case in USE_CASES:
                drawn = self._draw(family, use_case, LARGE_SAMPLE, np.random.default_rng(0))
                tokens = self._tokens_per_request(family, use_case, LARGEST_RUN)
                inputs, outputs = (float(lengths.mean()) for lengths in drawn)
                means[family, use_case] = inputs, outputs, tokens
                scales[family, use_case] = 1.0, (tokens - inputs) / outputs
        usual = float(np.median([scale for (_, use_case), (_, scale) in scales.items() if use_case != LONG_INPUTS]))
        for family in FAMILIES:
            inputs, outputs, tokens = means[family, LONG_INPUTS]
            scales[family, LONG_INPUTS] = (tokens - usual * outputs) / inputs, usual
        return scales

    def _draw(self, family: str, use_case: str, count: int, generator: np.random.Generator) -> tuple[Floats, Floats]:
        """Draw inputs and, independently, outputs as long as in the data set."""
        shares = (np.arange(2 * count) + 0.5) / (2 * count)
        inputs, outputs = (
            np.maximum(1, np.rint(self._tokenizers[family] * np.interp(generator.permutation(shares), *quantiles)))
            for quantiles in (self._quantiles[use_case, "input"], self._quantiles[use_case, "output"])
        )
        kept = np.flatnonzero(inputs + outputs < MAX_TOKENS)[:count]
        return inputs[kept], outputs[kept]

    def _requests(self, llm: str, use_case: str, request_count: int, sample: int) -> tuple[Integers, Integers]:
        """Return input and output tokens of a sample that has as many tokens per request as the runs of that size."""
        generator = np.random.default_rng([sample, request_count])
        inputs, outputs = self._lengths(llm.partition("-")[0], use_case, request_count, generator)
        scale = self._tokens_per_request(llm, use_case, request_count) / (inputs.mean() + outputs.mean())
        inputs, outputs = (np.maximum(1, np.rint(scale * lengths)).astype(np.int64) for lengths in (inputs, outputs))
        outputs = np.minimum(outputs, MAX_TOKENS - 2)
        return np.minimum(inputs, MAX_TOKENS - 1 - outputs), outputs

    def _lengths(self, family: str, use_case: str, count: int, generator: np.random.Generator) -> tuple[Floats, Floats]:
        """Draw inputs and outputs as long as the LLM makes them; the share of the outputs that comes is .5 or more."""
        inputs, outputs = self._draw(family, use_case, count, generator)
        input_scale, output_share = self._scales[family, use_case]
        shares = (np.arange(len(outputs)) + 0.5) / len(outputs)
        is_whole = generator.permutation(shares) < 2 * output_share - 1
        return input_scale * inputs, outputs * np.where(is_whole, 1.0, generator.permutation(shares))

    def seconds(self, run: OfflineRun, fit: Fit) -> Floats:
        """Return how long the simulated server takes for each of several samples of a run's requests."""
        tables, policy = fit.tables(LLMS[run.llm]), policy_of(run.block_count)
        samples = (self.requests(run.llm, run.use_case, run.request_count, sample) for sample in range(SAMPLES))
        return np.array(
            [
                simulate_arrivals(
                    policy=policy,
                    tables=tables,
                    arrival_seconds=np.zeros(len(inputs)),
                    input_tokens=inputs,
                    output_tokens=outputs,
                ).duration_seconds
                for inputs, outputs in samples
            ]
        )

    def simulated(self, run: OfflineRun, fit: Fit) -> float:
        """Return requests per second in the mean time of the samples."""
        return run.request_count / float(self.seconds(run, fit).mean())

    def p95(self, llm: str, use_case: str, block_count: int, rate: float, fit: Fit) -> float:
        """Return the median over samples of what 95 % of the requests stay below, at a rate per second."""
        family, found = llm.partition("-")[0], []
        for sample in range(SAMPLES):
            generator = np.random.default_rng([sample, ONLINE_SECONDS])
            count = max(1, int(generator.poisson(rate * ONLINE_SECONDS)))
            inputs, outputs = (
                np.maximum(1, np.rint(lengths)).astype(np.int64)
                for lengths in self._lengths(family, use_case, count, generator)
            )
            records = simulate_arrivals(
                policy=policy_of(block_count),
                tables=fit.tables(LLMS[llm]),
                arrival_seconds=np.sort(generator.uniform(0, ONLINE_SECONDS, len(inputs))),
                input_tokens=inputs,
                output_tokens=outputs,
            )
            latencies = (records.end_seconds - records.send_seconds) / outputs[records.request_index]
            found.append(np.quantile(latencies, 0.95))
        return float(np.median(found))

    def largest_rate(self, llm: str, use_case: str, block_count: int, fit: Fit) -> float:
        """Return the rate per second at which a simulated server is just within the study's limit."""
        low, high = 0.01, 100.0
        for _ in range(RATE_SEARCH_STEPS):
            middle = (low * high) ** 0.5
            is_within = self.p95(llm, use_case, block_count, middle, fit) <= LARGEST_P95
            low, high = (middle, high) if is_within else (low, middle)
        return low

    def error(self, fit: Fit) -> float:
        """Return the mean absolute error of the runs that the constants are fitted on."""
        errors = [
            self.simulated(run, fit) / run.requests_per_second - 1
            for run in self.runs
            if run.llm == FITTED_LLM and run.block_count in FITTED_BLOCKS and run.request_count in FITTED_COUNTS
        ]
        return float(np.abs(errors).mean())


def neighbours(fit: Fit, factor: float) -> Iterator[Fit]:
    """Yield the fit with one constant after the other multiplied and divided by a factor."""
    for field in fields(Fit):
        for change in (factor, 1 / factor):
            yield replace(fit, **{field.name: getattr(fit, field.name) * change})


def fitted(study: WorkloadChoice) -> Fit:
    """Go to the best neighbour until there is none better, then look closer."""
    best, least = FIT_START, study.error(FIT_START)
    for factor in FIT_FACTORS:
        is_better = True
        while is_better:
            errors = [(study.error(fit), fit) for fit in neighbours(best, factor)]
            error, fit = min(errors, key=lambda pair: pair[0])
            is_better = error < least
            if is_better:
                best, least = fit, error
    return best


def by_run(study: WorkloadChoice, fit: Fit) -> dict[OfflineRun, float]:
    """Return the simulated requests per second of every run."""
    return {run: study.simulated(run, fit) for run in study.runs}


def errors_of(simulated: dict[OfflineRun, float], llm: str, request_counts: tuple[int, ...]) -> Floats:
    """Return the relative errors of an LLM's runs."""
    return np.array(
        [
            requests_per_second / run.requests_per_second - 1
            for run, requests_per_second in simulated.items()
            if run.llm == llm and run.request_count in request_counts
        ]
    )


def memory_gain(requests_per_second: dict[OfflineRun, float]) -> float:
    """Return the geometric mean, over LLMs and use cases, of how much faster 600 blocks are than 150."""
    rates = {
        (run.llm, run.use_case, run.block_count): rate
        for run, rate in requests_per_second.items()
        if run.request_count == LARGEST_RUN
    }
    gains = [rates[llm, use_case, 600] / rates[llm, use_case, 150] for llm in LLMS for use_case in USE_CASES]
    return float(np.exp(np.log(gains).mean()))


def use_case_gain(requests_per_second: dict[OfflineRun, float], llm: str) -> float:
    """Return how much faster the slower of generation and QA is than the faster of summarization and conversation."""
    rates = {
        run.use_case: rate
        for run, rate in requests_per_second.items()
        if (run.llm, run.block_count, run.request_count) == (llm, 643, LARGEST_RUN)
    }
    return min(rates["alpaca"], rates["dolly"]) / max(rates["cnn_dailymail"], rates["sharegpt"])


def print_errors(study: WorkloadChoice, fit: Fit) -> None:
    """Print the table of the offline runs and the study's conclusions."""
    simulated, measured = by_run(study, fit), {run: run.requests_per_second for run in study.runs}
    columns = [*((count,) for count in REQUEST_COUNTS), REQUEST_COUNTS]
    titles = "".join(f"{title:>16}" for title in (*REQUEST_COUNTS, "all runs"))
    print("vLLM 0.2, A100 40GB, offline requests/s: mean absolute error (mean error) by number of requests")
    print(f"{'LLM':<12}{titles}{'target':>8}")
    for llm, target in TARGETS.items():
        errors = [errors_of(simulated, llm, counts) for counts in columns]
        cells = "".join(f"{f'{np.abs(each).mean():.1%} ({each.mean():+.1%})':>16}" for each in errors)
        print(f"{llm:<12}{cells}{target:>8.0%}")
    print(f"600 against 150 blocks: simulated {memory_gain(simulated):.2f}, measured {memory_gain(measured):.2f}")
    for llm in ("llama2-13b", "opt-13b"):
        gains = [use_case_gain(rates, llm) for rates in (simulated, measured)]
        print(
            f"generation and QA against summarization and conversation, {llm}: {gains[0]:.2f}, measured {gains[1]:.2f}"
        )


def print_online(study: WorkloadChoice, fit: Fit) -> None:
    """Print the errors of the largest rates."""
    errors: dict[str, list[float]] = {use_case: [] for use_case in USE_CASES}
    for (llm, use_case, block_count), measured in measured_rates(DATA / "workload-choice" / "online.csv").items():
        if measured >= LEAST_MEASURED_RATE:
            errors[use_case].append(study.largest_rate(llm, use_case, block_count, fit) / measured - 1)
    print(f"online, largest rate with p95 <= {LARGEST_P95} s per output token: mean absolute error (mean error)")
    for use_case, found in errors.items():
        print(f"{use_case:<15}{len(found):>3} servers {np.abs(found).mean():>8.1%} ({np.mean(found):+.1%})")


def main() -> None:
    """Print the tables."""
    study = WorkloadChoice(DATA / "workload-choice")
    fit = FIT
    if "--fit" in sys.argv[1:]:
        fit = fitted(study)
        print(fit)
    print_errors(study, fit)
    if "--online" in sys.argv[1:]:
        print_online(study, fit)


if __name__ == "__main__":
    main()
