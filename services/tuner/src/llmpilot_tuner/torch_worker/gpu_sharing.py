"""Whether a GPU is this worker's alone before it has touched it.

Invariant: it is asked before PyTorch makes a context there, so that whatever is used is of others.
"""

import shutil
import subprocess
from dataclasses import dataclass

QUERY_SECONDS = 20.0
USED_TOLERANCE_BYTES = 1 << 30
"""What a driver, a display or a monitor keep for themselves."""


@dataclass(frozen=True, slots=True)
class GpuUse:
    """What nvidia-smi says of a GPU."""

    used_bytes: int
    driver: str
    processes: tuple[str, ...]
    """Those that compute on it, e.g. "1234 python (5000 MiB)"; empty too where they cannot be seen."""


def gpu_use(uuid: str) -> GpuUse | None:
    """Ask nvidia-smi; None: it is not there or says nothing."""
    memory = _query("--query-gpu=memory.used,driver_version", uuid)
    if not memory:
        return None
    processes = _query("--query-compute-apps=pid,process_name,used_memory", uuid)
    return parse_gpu_use(memory, processes or "")


def parse_gpu_use(memory: str, processes: str) -> GpuUse | None:
    """Understand nvidia-smi's lines of comma-separated values without units."""
    used, _, driver = memory.strip().partition("\n")[0].partition(",")
    if not used.strip().isdecimal():  # "[N/A]": MIG without permission
        return None
    seen = []
    for line in processes.strip().splitlines():
        fields = [field.strip() for field in line.split(",")]
        if len(fields) == 3:  # noqa: PLR2004 as asked for
            pid, name, mebibytes = fields
            seen.append(f"{pid} {name} ({mebibytes} MiB)")
    return GpuUse(used_bytes=int(used) << 20, driver=driver.strip(), processes=tuple(seen))


def sharing_problem(use: GpuUse, tolerance_bytes: int = USED_TOLERANCE_BYTES) -> str:
    """Return who else is on the GPU and what to do; empty: nobody worth a word."""
    if use.used_bytes <= tolerance_bytes and not use.processes:
        return ""
    who = f"by {', '.join(use.processes)}" if use.processes else "by processes that cannot be seen from here"
    return (
        f"the GPU is shared: {use.used_bytes:,} bytes of it are used {who}; what they take or give back would be taken "
        "for the LLM's: end them, or choose another GPU with CUDA_VISIBLE_DEVICES"
    )


def _query(what: str, uuid: str) -> str | None:
    program = shutil.which("nvidia-smi")
    if program is None:
        return None
    command = [program, what, "--format=csv,noheader,nounits", f"--id={uuid}"]
    try:
        answer = subprocess.run(command, capture_output=True, text=True, timeout=QUERY_SECONDS, check=False)
    except (OSError, subprocess.TimeoutExpired):
        return None
    return answer.stdout if answer.returncode == 0 else None
