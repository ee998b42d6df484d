"""Enters a prober, has its worker run a step that never ends, and waits to be killed."""

import asyncio
import sys

from llmpilot_perfmodel.llm_config import parse_llm
from llmpilot_perfmodel.step_memory.batch import Batch, Execution, Layout, Rows
from llmpilot_tuner.domain.probing import ProbeKind
from llmpilot_tuner.domain.spec import TuningSpec
from llmpilot_tuner.probes import torch_probe
from llmpilot_tuner.probes.worker_process import WORKER_COMMAND

KIND, CONFIG_JSON, COMMAND = sys.argv[1], sys.argv[2], sys.argv[3:]


async def main() -> None:
    if COMMAND:  # one that needs no PyTorch
        torch_probe.LIBRARIES = ()
    spec = TuningSpec(
        config_json=CONFIG_JSON,
        probe=ProbeKind(KIND),
        gpu_memory_bytes=1 << 30,
        reserved_bytes=0,
        longest_sequence=100,
        most_new_tokens=10,
        most_requests=10,
        step_seconds=3600,
    )
    execution = Execution(layout=Layout.PACKED, activation_bits=32)
    batch = Batch(case="odd", decode=(Rows(request_count=1, input_tokens=1, output_tokens=1),), pool_tokens=2)
    command = COMMAND or WORKER_COMMAND
    async with torch_probe.TorchProber(spec, parse_llm(CONFIG_JSON), execution, command=command) as prober:
        print(*prober.worker_pids, flush=True)  # noqa: T201 the test reads it
        while True:
            async for _ in prober.run([batch] * 100):
                pass


asyncio.run(main())
