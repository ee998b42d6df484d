"""Load testers side by side: CPU per token, memory, and how far each is from the true times of the same golden server.

    python benchmarks/loadtester.py [--peers FOLDER] [--only NAME ...] [--streams 1,8,32,128,512] [--lockstep 128]
        [--rate 100] [--seconds 20] [--output-tokens 100] [--keep FOLDER]

The server (loadtest/golden.py) has one core, the client and all its processes another. Without --peers, or where one is
not installed (loadtest/clients.py says how), only the others run. CPU and tokens are those of the time between the
first two and the last two seconds of load; errors are reported minus true, over the same requests where the client says
which, and otherwise between quantiles. "Each ITL" is the p99 of the absolute error of single gaps. As root, a request's
arrival is when the kernel had it (loadtest/arrivals.py); otherwise when the server saw it, up to .3 ms later.

The largest rate: --only llm-pilot --lockstep "" --rate "" --output-tokens 400 --streams 560,640,720,800
Memory over time: --only llm-pilot --lockstep "" --rate "" --streams 128 --seconds 600
"""

import argparse
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import numpy.typing as npt
from loadtest.arrivals import Tap
from loadtest.clients import CLIENTS, Client, Report, Run
from loadtest.golden import SERVED_MODEL, Truth, golden_server, read_truth
from loadtest.process_tree import Usage

CORES = sorted(os.sched_getaffinity(0))
"""The first is the server's, the last the clients'."""
EDGE_SECONDS = 2.0
START_SECONDS = 120.0
"""What a client may take for starting, and again for its reports."""
TITLES = (
    *("client", "load", "requests", "tokens/s", "CPU us/token", "core", "peak MB", "TTFT p50 ms", "p99"),
    *("ITL p50 ms", "p99", "each ITL p99 ms", "arrivals/s", "gap CV", "B/token", "server late p99 ms", "note"),
)


@dataclass(frozen=True, slots=True, kw_only=True)
class Load:
    """What a client is asked for."""

    streams: int = 0
    rate_per_second: float = 0.0
    mode: str = "staggered"

    @property
    def label(self) -> str:
        """A few words."""
        if self.streams:
            return f"{self.streams}{' lockstep' if self.mode == 'lockstep' else ''}"
        return f"{self.rate_per_second:g}/s"


@dataclass(frozen=True, slots=True, kw_only=True)
class Observed:
    """What came of it."""

    report: Report
    truth: Truth
    usage: Usage
    server_late_ms: npt.NDArray[np.float64]


def loaded_span(truth: Truth) -> tuple[int, int]:
    """Return the time between the first and the last two seconds of load."""
    edge = int(EDGE_SECONDS * 1e9)
    return int(truth.arrival_nanos.min()) + edge, int(truth.written_nanos.max()) - edge


def run_client(client: Client, load: Load, run: Run) -> Observed:
    """Run one client against a server of its own."""
    server_core, client_core = CORES[0], CORES[-1]
    log = run.folder / "writes"
    with golden_server(load.mode, log, core=server_core) as (address, _):
        run = replace(run, url=f"http://{address}")
        tap = Tap.open(int(address.rpartition(":")[2]))
        command = ["taskset", "-c", str(client_core), *client.command(run)]
        output = (run.folder / "output").open("wb")
        environment = {**os.environ, "OMP_NUM_THREADS": "1", **client.environment(run)}
        process = subprocess.Popen(
            command, stdout=output, stderr=subprocess.STDOUT, cwd=run.folder, env=environment, start_new_session=True
        )
        usage = Usage(process.pid, client.part)
        usage.start()
        try:
            process.wait(run.seconds * 3 + 2 * START_SECONDS)
        except subprocess.TimeoutExpired:
            os.killpg(process.pid, 9)
            process.wait()
            raise
        finally:
            usage.stop()
            output.close()
            if tap is not None:
                tap.close()
                time.sleep(0.3)
    truth = read_truth(log, output_tokens=run.output_tokens)
    if tap is not None:
        truth = replace(truth, arrival_nanos=tap.arrival_nanos(truth.request_ids, truth.arrival_nanos))
    return Observed(report=client.read(run), truth=truth, usage=usage, server_late_ms=truth.lateness_nanos / 1e6)


def joined(report: Report, truth: Truth) -> tuple[Report, Truth, npt.NDArray[np.float64]]:
    """Return both sides with the same requests in the same order, and the absolute error of each gap in ms."""
    row_of = {name.rpartition("-")[2]: row for row, name in enumerate(truth.request_ids)}
    row_of |= {name: row for row, name in enumerate(truth.request_ids)}
    gap_count = truth.written_nanos.shape[1] - 1
    replies = [reply for reply in report.replies if reply.request_id in row_of and len(reply.gaps_ms) == gap_count]
    if not replies:
        return report, truth, np.zeros(0)
    rows = np.array([row_of[reply.request_id] for reply in replies])
    same = truth.take(rows)
    errors = np.abs(np.stack([reply.gaps_ms for reply in replies]) - same.itl_ms)
    return replace(report, replies=tuple(replies)), same, errors.ravel()


def cells(client: Client, load: Load, observed: Observed) -> Iterator[str]:
    """Yield a row of the table."""
    truth, usage = observed.truth, observed.usage
    start, end = loaded_span(truth)
    seconds = (end - start) / 1e9
    tokens = int(((truth.written_nanos >= start) & (truth.written_nanos < end)).sum())
    cpu_seconds = usage.cpu_between(start, end)
    report, same, gap_errors_ms = joined(observed.report, truth)
    yield from (client.name, load.label, f"{len(truth):,}", f"{tokens / seconds:,.0f}")
    yield f"{1e6 * cpu_seconds / tokens:.1f}" if tokens else "-"
    yield f"{cpu_seconds / seconds:.2f}"
    yield f"{usage.peak_megabytes(end):.0f}"
    yield from errors(report.ttft_quantiles_ms(), same.ttft_ms)
    yield from errors(report.itl_quantiles_ms(), same.itl_ms.ravel())
    yield f"{np.percentile(gap_errors_ms, 99):.3f}" if len(gap_errors_ms) else "-"
    yield from arrivals(truth, start, end) if not load.streams else ("", "")
    exported_tokens = truth.written_nanos.size
    yield "-" if report.export_bytes is None else f"{report.export_bytes / exported_tokens:.1f}"
    yield f"{np.percentile(observed.server_late_ms, 99):.2f}"
    part_us, part_megabytes = 1e6 * usage.part_cpu_between(start, end) / max(tokens, 1), usage.part_peak_megabytes(end)
    part = f"its workers: {part_us:.1f} us/token, {part_megabytes:.0f} MB" if client.part else ""
    slope = usage.growth_megabytes_per_hour(start, end)
    yield "; ".join(filter(None, (report.note, part, "" if slope is None else f"{slope:+.1f} MB/h")))


def errors(reported: tuple[float, float] | None, true: npt.NDArray[np.float64]) -> Iterator[str]:
    """Yield the errors of median and p99."""
    for index, share in enumerate((50, 99)):
        yield "-" if reported is None else f"{reported[index] - np.percentile(true, share):+.3f}"


def arrivals(truth: Truth, start: int, end: int) -> Iterator[str]:
    """Yield the rate of arrivals and the coefficient of variation of the gaps between them."""
    inside = np.sort(truth.arrival_nanos[(truth.arrival_nanos >= start) & (truth.arrival_nanos < end)])
    gaps = np.diff(inside)
    yield f"{1e9 / gaps.mean():.2f}"
    yield f"{gaps.std() / gaps.mean():.3f}"


def loads(arguments: argparse.Namespace) -> Iterator[Load]:
    """Yield the loads in the order of the table."""
    for count in arguments.streams:
        yield Load(streams=count)
    for count in arguments.lockstep:
        yield Load(streams=count, mode="lockstep")
    for rate in arguments.rate:
        yield Load(rate_per_second=rate)


def numbers(text: str) -> list[int]:
    """Return the numbers of a list with commas."""
    return [int(part) for part in text.split(",") if part]


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--peers", type=Path, default=Path(os.environ.get("LLMPILOT_PEERS", "peers")))
    parser.add_argument("--only", action="append", default=[])
    parser.add_argument("--streams", type=numbers, default=[1, 8, 32, 128, 512])
    parser.add_argument("--lockstep", type=numbers, default=[128])
    parser.add_argument("--rate", type=numbers, default=[100])
    parser.add_argument("--seconds", type=float, default=20.0)
    parser.add_argument("--output-tokens", type=int, default=100)
    parser.add_argument("--keep", type=Path, default=None)
    arguments = parser.parse_args()
    os.sched_setaffinity(0, {CORES[0]})
    print("| " + " | ".join(TITLES) + " |\n" + "|---" * len(TITLES) + "|", flush=True)
    for client in CLIENTS:
        if arguments.only and not any(word in client.name for word in arguments.only):
            continue
        if client.program and not (arguments.peers / client.program).exists():
            print(f"{client.name} is not in {arguments.peers}: skipped", file=sys.stderr)
            continue
        for load in loads(arguments):
            if load.streams or client.can_be_open:
                print(row(client, load, arguments), flush=True)


def row(client: Client, load: Load, arguments: argparse.Namespace) -> str:
    """Return a line of the table."""
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        if arguments.keep is not None:
            folder = arguments.keep / f"{client.name} {load.label}".replace(" ", "-").replace("/", "-")
            folder.mkdir(parents=True, exist_ok=True)
        run = Run(
            url="",
            model=SERVED_MODEL,
            streams=load.streams,
            rate_per_second=load.rate_per_second,
            seconds=arguments.seconds,
            output_tokens=arguments.output_tokens,
            folder=folder,
            peers=arguments.peers,
        )
        try:
            return "| " + " | ".join(cells(client, load, run_client(client, load, run))) + " |"
        except Exception as error:  # noqa: BLE001 one client's failure must not end the comparison
            return f"| {client.name} | {load.label} | failed: {type(error).__name__}: {error} |"


if __name__ == "__main__":
    main()
