"""The tuner's search against plain binary search and against every weight probed, under a real limit of memory.

Six architectures with random weights run on the CPU; an allocation beyond the limit really fails. First table: a range
of a million weights, 1 % precision. Second table (--truth): a small range, every weight of it probed, near the limit
with every maximal batch, by the same worker as the search; what was found must not be above the largest safe weight,
and at most 1 % below.

Usage: python benchmarks/tuner_search.py [--truth] [--llm NAME ...]
"""

import argparse
import asyncio
import json
import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import NamedTuple, Self

from tuning.searches import Searched, plain_search, run_batches, steps_of, tuned

from llmpilot_perfmodel.step_memory.batch import Batch
from llmpilot_tuner.domain.corners import corner_batches
from llmpilot_tuner.domain.limits import Limits
from llmpilot_tuner.domain.plan import plan_of
from llmpilot_tuner.domain.probing import ProbeFacts, ProbeKind, Prober
from llmpilot_tuner.domain.result import TuningResult
from llmpilot_tuner.domain.search import Problem
from llmpilot_tuner.domain.servers import Server
from llmpilot_tuner.domain.spec import TuningSpec
from llmpilot_tuner.probes.open_probe import open_probe

SIZES = {"hidden_size": 128, "intermediate_size": 344, "vocab_size": 2048, "max_position_embeddings": 4096}
LLAMA = {
    **SIZES,
    "model_type": "llama",
    "num_hidden_layers": 4,
    "num_attention_heads": 8,
    "num_key_value_heads": 8,
    "hidden_act": "silu",
    "torch_dtype": "float32",
}
T5 = {
    "model_type": "t5",
    "d_model": 128,
    "d_ff": 512,
    "d_kv": 16,
    "num_heads": 8,
    "num_layers": 4,
    "vocab_size": 2048,
    "decoder_start_token_id": 0,
    "torch_dtype": "float32",
}
LLMS: dict[str, dict[str, object]] = {
    "Llama MHA": LLAMA,
    "Llama GQA": {**LLAMA, "num_key_value_heads": 2},
    "GPT-NeoX": {**LLAMA, "model_type": "gpt_neox", "intermediate_size": 512, "hidden_act": "gelu"},
    "StarCoder (MQA)": {
        "model_type": "gpt_bigcode",
        "n_embd": 128,
        "n_head": 8,
        "n_layer": 4,
        "n_positions": 4096,
        "vocab_size": 2048,
        "multi_query": True,
        "torch_dtype": "float32",
    },
    "T5": T5,
    "Mixtral": {
        **LLAMA,
        "model_type": "mixtral",
        "num_key_value_heads": 2,
        "num_local_experts": 4,
        "num_experts_per_tok": 2,
    },
}


class Shape(NamedTuple):
    """What requests may be."""

    longest_sequence: int
    most_new_tokens: int
    most_requests: int


WIDE = Shape(longest_sequence=250, most_new_tokens=100, most_requests=4000)
NARROW = Shape(longest_sequence=64, most_new_tokens=32, most_requests=64)
GRANULE = 8
"""Of the small range."""
NARROW_MIB = 16
"""Beside the weights."""
NEAR = 0.015
"""Share of the weights around the limit that are probed with every maximal batch."""


def spec_of(name: str, *, memory_mib: float, limits: Shape, granule: int = 1, soak_steps: int = 0) -> TuningSpec:
    """Return a tuning of one architecture under a limit."""
    return TuningSpec(
        config_json=json.dumps(LLMS[name]),
        llm_name=name,
        probe=ProbeKind.CPU,
        server=Server.TGI,
        gpu_memory_bytes=round(memory_mib * 2**20),
        reserved_bytes=0,
        precision_name="fp32",
        granule=granule,
        prefill_limit=None,
        soak_steps=soak_steps,
        longest_sequence=limits.longest_sequence,
        most_new_tokens=limits.most_new_tokens,
        most_requests=limits.most_requests,
    )


async def guided(spec: TuningSpec) -> Searched:
    """Tune as the product does."""
    started = time.perf_counter()
    result = await tuned(spec)
    return Searched(
        weight=result.max_batch_weight,
        probe_count=len(result.probes),
        step_count=steps_of(result),
        seconds=time.perf_counter() - started,
    )


def every_maximal_batch(problem: Problem, limits: Limits, weight: int) -> list[Batch]:
    """Return the corners of a weight, and for every number of requests the longest prefill and decode batch."""
    batches = list(problem.cases(weight))
    for most in range(1, limits.most_requests + 1):
        batches += corner_batches(replace(limits, most_requests=most), weight)
    return list({replace(batch, case=""): batch for batch in batches}.values())


class Entered:
    """A prober that somebody else has entered and will leave."""

    def __init__(self, prober: Prober) -> None:
        self._prober = prober
        self.run = prober.run

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(self, *error: object) -> None:
        pass

    @property
    def facts(self) -> ProbeFacts:
        """Its facts."""
        return self._prober.facts


async def largest_passing(prober: Prober, weights: range, batches: Callable[[int], Sequence[Batch]]) -> tuple[int, int]:
    """Probe weights in turn; returns the largest below the first that failed, and the steps it took."""
    largest, steps = weights.start - weights.step, 0
    for weight in weights:
        passed, ran = await run_batches(prober, batches(weight))
        steps += ran
        if not passed:
            break
        largest = weight
    return largest, steps


async def truth(spec: TuningSpec) -> tuple[int, int, TuningResult]:
    """Return the largest weight below which all passed, the steps it took to know, and what a tuning finds."""
    plan = plan_of(spec)
    problem = plan.problem
    async with open_probe(plan) as prober:
        every = range(problem.lowest, problem.highest + 1, problem.granule)
        near, steps = await largest_passing(prober, every, problem.cases)
        around = range(max(problem.lowest, problem.down(near * (1 - NEAR))), near + 1, problem.granule)
        largest, more = await largest_passing(
            prober, around, lambda weight: every_maximal_batch(problem, plan.limits, weight)
        )
        return largest, steps + more, await tuned(spec, open_prober=lambda _: Entered(prober))


async def search_table(names: list[str]) -> None:
    """Print probes of both searches over a million weights."""
    print("| LLM | limit MiB | ours: weight | probes | steps | s | plain: weight | probes | steps | s |")
    print("|---|---|---|---|---|---|---|---|---|---|")
    counts: list[int] = []
    for name in names:
        for memory_mib in (100, 300):
            spec = spec_of(name, memory_mib=memory_mib, limits=WIDE)
            ours, theirs = await guided(spec), await plain_search(plan_of(spec))
            counts.append(ours.probe_count)
            cells = (
                f"{row.weight:,} | {row.probe_count} | {row.step_count} | {row.seconds:.1f}" for row in (ours, theirs)
            )
            print(f"| {name} | {memory_mib} | {' | '.join(cells)} |", flush=True)
    print(f"median of ours: {statistics.median(counts)}, most: {max(counts)}")


async def truth_table(names: list[str]) -> None:
    """Print the weight that was found beside the largest that every maximal batch passed."""
    print("| LLM | limit MiB | largest safe weight | steps | search | below by % | after the soak | below by % |")
    print("|---|---|---|---|---|---|---|---|")
    for name in names:
        weights = plan_of(spec_of(name, memory_mib=1000, limits=NARROW)).predict.weight_bytes
        memory_mib = weights / 2**20 + NARROW_MIB
        spec = spec_of(name, memory_mib=memory_mib, limits=NARROW, granule=GRANULE, soak_steps=1)
        largest, steps, result = await truth(spec)
        searched = result.max_batch_weight + result.margin_weight
        below = (100 * (1 - weight / largest) for weight in (searched, result.max_batch_weight))
        print(
            f"| {name} | {memory_mib:.1f} | {largest:,} | {steps:,} | {searched:,} | {next(below):.2f} | "
            f"{result.max_batch_weight:,} | {next(below):.2f} |",
            flush=True,
        )


def main() -> None:
    """Print a table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--truth", action="store_true")
    parser.add_argument("--llm", nargs="*", choices=list(LLMS), default=list(LLMS))
    arguments = parser.parse_args()
    asyncio.run((truth_table if arguments.truth else search_table)(arguments.llm))


if __name__ == "__main__":
    main()
