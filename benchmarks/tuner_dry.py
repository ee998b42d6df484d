"""Full-size LLMs tuned with the dry probe: time, memory of all processes, and the weight against the formulas' alone.

Usage: python benchmarks/tuner_dry.py
"""

import asyncio
import threading
import time

import psutil
from tuning.searches import steps_of, tuned

from llmpilot_perfmodel.bundled_llms import bundled_config
from llmpilot_tuner.domain.probing import ProbeKind
from llmpilot_tuner.domain.result import TuningResult
from llmpilot_tuner.domain.servers import Server
from llmpilot_tuner.domain.spec import TuningSpec

GIB = 2**30
CASES = (
    ("meta-llama/Llama-3.1-8B", 1, 72, None),
    ("meta-llama/Llama-3.1-8B", 1, 72, 8192),
    ("meta-llama/Llama-3.1-70B", 1, 288, None),
    ("meta-llama/Llama-3.1-70B", 4, 72, None),
)
"""LLM, GPUs, GiB of each, prefill limit."""
MEGABYTE = 10**6


class PeakMemory:
    """The most that this process and those it started have had at once, in bytes, sampled every 20 ms."""

    def __init__(self) -> None:
        self.peak_bytes = 0
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._watch)

    def __enter__(self) -> "PeakMemory":
        self._thread.start()
        return self

    def __exit__(self, *error: object) -> None:
        self._stop.set()
        self._thread.join()

    def _watch(self) -> None:
        me = psutil.Process()
        while not self._stop.wait(0.02):
            total = 0
            for process in (me, *me.children(recursive=True)):
                try:
                    total += process.memory_info().rss
                except psutil.NoSuchProcess:
                    continue
            self.peak_bytes = max(self.peak_bytes, total)


async def tune(name: str, gpu_count: int, gib: int, prefill_limit: int | None) -> TuningResult:
    """Return what a tuning found."""
    spec = TuningSpec(
        config_json=bundled_config(name),
        llm_name=name,
        probe=ProbeKind.DRY,
        server=Server.TGI,
        gpu_count=gpu_count,
        gpu_memory_bytes=gib * GIB,
        reserved_bytes=0,
        longest_sequence=8192,
        most_new_tokens=1024,
        most_requests=256,
        prefill_limit=prefill_limit,
    )
    return await tuned(spec)


def main() -> None:
    """Print the table."""
    print("| LLM | GPUs | GiB each | prefill limit | formulas | found | off by % | probes | steps | s | RAM MB |")
    print("|---|---|---|---|---|---|---|---|---|---|---|")
    for name, gpu_count, gib, prefill_limit in CASES:
        started = time.perf_counter()
        with PeakMemory() as memory:
            result = asyncio.run(tune(name, gpu_count, gib, prefill_limit))
        seconds = time.perf_counter() - started
        predicted = result.predicted_weight or 0
        off = 100 * (result.max_batch_weight / predicted - 1) if predicted else float("nan")
        print(
            f"| {name} | {gpu_count} | {gib} | {prefill_limit or 'none'} | {predicted:,} | "
            f"{result.max_batch_weight:,} | {off:+.3f} | {len(result.probes)} | {steps_of(result)} | {seconds:.1f} | "
            f"{memory.peak_bytes / MEGABYTE:,.0f} |",
            flush=True,
        )


if __name__ == "__main__":
    main()
