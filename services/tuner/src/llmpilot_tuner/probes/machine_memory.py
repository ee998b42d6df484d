"""How much memory this machine has for a process, its container's limit included."""

import re
from pathlib import Path


def available_bytes(root: Path = Path("/")) -> int | None:
    """Return what can be allocated now; None: it is not told."""
    try:
        text = (root / "proc/meminfo").read_text()
    except OSError:
        return None
    found = re.search(r"^MemAvailable:\s+(\d+) kB$", text, re.MULTILINE)
    if found is None:
        return None
    return min(int(found.group(1)) * 1024, *_limits(root), 2**63)


def _limits(root: Path) -> list[int]:
    """What is left of the limit of the container, where cgroups say."""
    files = (("memory.max", "memory.current"), ("memory/memory.limit_in_bytes", "memory/memory.usage_in_bytes"))
    left = []
    for limit_file, used_file in files:
        try:
            limit, used = ((root / "sys/fs/cgroup" / name).read_text().strip() for name in (limit_file, used_file))
        except OSError:
            continue
        if limit.isdecimal() and used.isdecimal():  # else "max"
            left.append(int(limit) - int(used))
    return left
