"""The other side of simulation_speed.py: vidur on the same requests, run by a Python that has it.

    python -m venv VIDUR && VIDUR/bin/pip install vidur
    python benchmarks/simulation_speed.py --vidur VIDUR/bin/python

vidur's own event loop, vLLM scheduler and block manager, on one replica, with every metric switched off. Its execution
times come from data sets on a hub; here they are the same linear function as ours, which also costs it next to nothing.
Reads a JSON object from standard input and writes one to standard output.
"""

import json
import logging
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from vidur._native.entities import ExecutionTime  # type: ignore[import-not-found]
from vidur.config.config import (  # type: ignore[import-not-found]
    CacheConfig,
    ClusterConfig,
    MetricsConfig,
    ReplicaConfig,
    SimulationConfig,
    TraceRequestGeneratorConfig,
    VllmSchedulerConfig,
)
from vidur.execution_time_predictor import ExecutionTimePredictorRegistry  # type: ignore[import-not-found]
from vidur.simulator import Simulator  # type: ignore[import-not-found]

LONGEST_TOKENS = 4096


class LinearTime:
    """A step's time as a linear function of its work."""

    def __init__(self, milliseconds: dict[str, float]) -> None:
        self._milliseconds = milliseconds

    def get_execution_time(self, batch: Any, _stage: int) -> Any:
        """Return the time of a batch; vidur counts one token for a decode."""
        constants = self._milliseconds
        decodes = [cached for new, cached in zip(batch.num_q_tokens, batch.num_kv_tokens, strict=True) if new == 1]
        prompts = [new for new in batch.num_q_tokens if new > 1]
        milliseconds = (
            max(constants["decode"] if decodes else 0.0, constants["prefill"] if prompts else 0.0)
            + constants["per_sequence"] * len(decodes)
            + constants["per_cached_token"] * sum(decodes)
            + constants["per_token"] * sum(prompts)
            + constants["per_request"] * len(prompts)
        )
        return ExecutionTime(1, 0, 0, milliseconds, *[0] * 11)


def simulator(job: dict[str, Any], trace: Path) -> Any:
    """Return a simulator that is ready to run."""
    switched_off = {name: False for name, field in MetricsConfig.__dataclass_fields__.items() if field.default is True}
    rows = [
        "Date,Time,PromptTokenCount,CompletionTokenCount",
        *(f"d,{row[0]},{row[1]},{row[2]}" for row in job["requests"]),
    ]
    trace.write_text("\n".join(rows) + "\n")
    ExecutionTimePredictorRegistry.get = lambda *_, **__: LinearTime(job["milliseconds"])
    replica = ReplicaConfig(num_pipeline_stages=1, tensor_parallel_size=1)
    made = Simulator(
        SimulationConfig(
            cluster_config=ClusterConfig(
                replica_config=replica,
                replica_scheduler_config=VllmSchedulerConfig(
                    max_tokens_in_batch=job["max_tokens_in_batch"], batch_size_cap=job["max_sequences"]
                ),
                cache_config=CacheConfig(num_blocks=job["block_count"], block_size=job["block_size"]),
            ),
            metrics_config=MetricsConfig(**switched_off, output_dir=str(trace.parent)),
            request_generator_config=TraceRequestGeneratorConfig(
                trace_file=str(trace),
                date="d",
                prefill_scale_factor=1,
                time_scale_factor=1,
                max_tokens=LONGEST_TOKENS,
            ),
        )
    )
    made._write_output = lambda: None
    return made


def main() -> None:
    """Run one job and report what it took."""
    logging.disable(logging.CRITICAL)
    job = json.load(sys.stdin)
    with tempfile.TemporaryDirectory() as folder:
        ready = simulator(job, Path(folder) / "trace.csv")
        started = time.process_time()
        ready.run()
        taken = time.process_time() - started
    json.dump({"cpu_seconds": taken, "simulated_seconds": ready._time}, sys.stdout)


if __name__ == "__main__":
    main()
