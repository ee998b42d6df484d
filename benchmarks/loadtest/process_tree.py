"""CPU and memory of a process and all its descendants, sampled while they run.

Invariant: what a child used stays counted after it ended, as its parent inherits it when it waits for it; and nothing
is read again and again that locks a process's memory map (smaps, cmdline), which would stop the process itself.
"""

import os
import threading
import time
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

_TICKS_PER_SECOND = os.sysconf("SC_CLK_TCK")
_CPU_SECONDS = 0.2
_STARTED_SAMPLES = 40
"""After so many a process is what it is going to be: its command line does not change any more."""
_LEAST_GROWTH_NANOS = 120_000_000_000


def descendants(root: int) -> list[int]:
    """Return the ids of a process and of all below it."""
    found = [root]
    for process in found:
        try:
            for children in Path(f"/proc/{process}/task").glob("*/children"):
                found += [int(child) for child in children.read_text().split()]
        except OSError:
            continue
    return found


def cpu_seconds(processes: list[int]) -> float:
    """Return what the processes and the children that they waited for have used, user and system."""
    ticks = 0
    for process in processes:
        try:
            fields = Path(f"/proc/{process}/stat").read_text().rpartition(")")[2].split()
        except OSError:
            continue
        ticks += sum(int(field) for field in fields[11:15])
    return ticks / _TICKS_PER_SECOND


def command_line(process: int) -> str:
    """Return the command line of a process; empty if it is gone."""
    try:
        return Path(f"/proc/{process}/cmdline").read_text().replace("\0", " ")
    except OSError:
        return ""


def memory_megabytes(processes: list[int]) -> float:
    """Return the anonymous memory of all processes, and the file pages of the largest, as they share libraries."""
    anonymous = [0]
    files = [0]
    for process in processes:
        try:
            lines = Path(f"/proc/{process}/status").read_text().splitlines()
        except OSError:
            continue
        sizes = {line.split(":")[0]: int(line.split()[1]) for line in lines if line.startswith("Rss")}
        anonymous.append(sizes.get("RssAnon", 0) + sizes.get("RssShmem", 0))
        files.append(sizes.get("RssFile", 0))
    return (sum(anonymous) + max(files)) / 1024


@dataclass(slots=True)
class Usage:
    """What a process tree used."""

    process: int
    part: str = ""
    """Of the command lines of the processes whose CPU is also told apart; empty: of none."""
    part_cpu: list[float] = field(default_factory=list)
    part_memory: list[float] = field(default_factory=list)
    nanos: list[int] = field(default_factory=list)
    """CLOCK_REALTIME of each sample."""
    cpu: list[float] = field(default_factory=list)
    memory_nanos: list[int] = field(default_factory=list)
    memory: list[float] = field(default_factory=list)
    is_over: threading.Event = field(default_factory=threading.Event)
    command_lines: dict[int, str] = field(default_factory=dict)

    def start(self) -> None:
        """Sample in a thread of the lowest priority, so that the server that shares its core is not delayed."""
        threading.Thread(target=self._run, daemon=True).start()

    def stop(self) -> None:
        """Sample no more."""
        self.is_over.set()

    def cpu_between(self, from_nanos: int, until_nanos: int) -> float:
        """Return CPU seconds used in a time span."""
        return self._between(self.cpu, from_nanos, until_nanos)

    def part_cpu_between(self, from_nanos: int, until_nanos: int) -> float:
        """Return CPU seconds that the processes of the part used in a time span."""
        return self._between(self.part_cpu, from_nanos, until_nanos)

    def peak_megabytes(self, until_nanos: int) -> float:
        """Return the largest memory before a time: reports are written after the load."""
        return self._peak(self.memory, until_nanos)

    def part_peak_megabytes(self, until_nanos: int) -> float:
        """Return the largest memory of the part before a time."""
        return self._peak(self.part_memory, until_nanos)

    def growth_megabytes_per_hour(self, from_nanos: int, until_nanos: int) -> float | None:
        """Return the slope of the memory in the second half of a time span; None where that is too short to tell."""
        at, memory = np.array(self.memory_nanos), np.array(self.memory)
        later = (at >= (from_nanos + until_nanos) / 2) & (at <= until_nanos)
        if until_nanos - from_nanos < _LEAST_GROWTH_NANOS:
            return None
        return float(np.polyfit(at[later] - at[0], memory[later], 1)[0] * 3600e9)

    def _between(self, cpu: list[float], from_nanos: int, until_nanos: int) -> float:
        start, end = np.interp([from_nanos, until_nanos], self.nanos, cpu)
        return float(end - start)

    def _peak(self, memory: list[float], until_nanos: int) -> float:
        return max((size for at, size in zip(self.memory_nanos, memory, strict=True) if at <= until_nanos), default=0.0)

    def _run(self) -> None:
        os.sched_setscheduler(0, os.SCHED_IDLE, os.sched_param(0))
        while not self.is_over.wait(_CPU_SECONDS):
            self._sample()

    def _sample(self) -> None:
        processes = descendants(self.process)
        part = [process for process in processes if self.part and self._is_of_part(process)]
        used = cpu_seconds(processes)
        if self.cpu and used < self.cpu[-1]:  # the tree is ending
            return
        self.nanos.append(time.time_ns())
        self.cpu.append(used)
        self.part_cpu.append(cpu_seconds(part))
        self.memory_nanos.append(time.time_ns())
        self.memory.append(memory_megabytes(processes))
        self.part_memory.append(memory_megabytes(part))

    def _is_of_part(self, process: int) -> bool:
        if self.part not in self.command_lines.get(process, ""):
            if self.command_lines.get(process) and len(self.nanos) > _STARTED_SAMPLES:
                return False
            self.command_lines[process] = command_line(process)
        return self.part in self.command_lines[process]
