"""A tuning in a few lines: what the terminal shows at its end, and the page at its top."""

from rich.table import Table
from rich.text import Text

from llmpilot_tuner.domain.probing import ProbeKind
from llmpilot_tuner.outputs.report import Report, ReportedSoak
from llmpilot_tuner.outputs.words import LIMITS, NOTHING, count, memory, seconds


def facts(report: Report) -> list[tuple[str, str]]:
    """Return what was found, as names and values."""
    settled = report.memory
    found = [
        ("maximum batch weight", f"{count(report.max_batch_weight)} {report.weight_unit}"),
        ("the largest batch", f"{count(report.largest_batch_tokens)} tokens"),
        ("longest requests at once", _longest(report)),
        ("no larger because", LIMITS.get(report.limit, report.limit)),
        ("evidence", report.evidence),
        ("capacity" if report.probe == ProbeKind.CPU else "capacity of each GPU", _capacity(report)),
        ("weights", memory(settled.llm_weights_bytes)),
    ]
    if settled.case:
        found.append((f"cache in {settled.case}", f"{memory(settled.cache_bytes)}, by prediction"))
        found.append((f"working memory, {settled.phase}", f"{memory(settled.working_bytes)}, by prediction"))
    found += [
        ("probes", f"{len(report.probes)}, plain binary search up to {report.plain_probe_count}"),
        ("margin", margin_words(report)),
        ("the formulas alone say", count(report.predicted_weight)),
        ("for requests of half the length", _half(report)),
        ("time", seconds(report.elapsed_seconds)),
    ]
    return found


def margin_words(report: Report) -> str:
    """Return what was taken off, and what the final verdict saw that says so."""
    taken = f"{count(report.margin_weight)} taken off" if report.margin_weight else "none taken off"
    soak = report.soak
    if soak is None:
        why = "no final verdict was asked for" if report.is_measured else "nothing was allocated, so nothing could grow"
        return f"{taken}: {why}"
    if report.probe == ProbeKind.SERVER:
        words = [f"{taken}: the server answered {soak.step_count} batches between the corner cases, too"]
        return "; ".join([*words, *_lowered(soak)])
    words = [
        f"{taken}: {soak.step_count} steps in random order in a fresh process",
        f"the allocator's unused memory grew by {memory(soak.growth_bytes)}",
        f"what stays between steps by {memory(soak.drift_bytes)}",
    ]
    return "; ".join([*words, *_lowered(soak)])


def _lowered(soak: ReportedSoak) -> list[str]:
    weights = soak.lowered_from_weights
    return [f"lowered from {', '.join(map(count, weights))}"] if weights else []


def facts_table(report: Report) -> Table:
    """Return the facts as a table without lines."""
    table = Table(box=None, show_header=False, padding=(0, 2, 0, 0))
    table.add_column(no_wrap=True)
    table.add_column(overflow="fold")
    for name, value in facts(report):
        table.add_row(Text(name), Text(value))
    return table


def headroom_table(report: Report) -> Table:
    """Return how near each corner case comes to the capacity, the nearest first."""
    table = Table(box=None, padding=(0, 2, 0, 0))
    table.add_column("corner case", no_wrap=True)
    for name in ("predicted", "tensors", "allocator", "headroom"):
        table.add_column(name, justify="right", no_wrap=True)
    table.add_column("batch", overflow="fold")
    for case in sorted(report.headroom, key=lambda each: each.headroom_bytes):
        table.add_row(
            case.case,
            memory(case.predicted_bytes),
            memory(case.peak_bytes),
            memory(case.reserved_bytes),
            memory(case.headroom_bytes),
            case.batch,
        )
    return table


def _capacity(report: Report) -> str:
    settled = report.memory
    beside = f", {memory(settled.set_aside_bytes)} set aside" if settled.set_aside_bytes else ""
    return f"{memory(settled.capacity_bytes)}{beside}"


def _longest(report: Report) -> str:
    return f"{count(report.longest_request_count)} of {count(report.limits.longest_sequence_tokens)} tokens"


def _half(report: Report) -> str:
    if report.half_sequence_weight is None:
        return NOTHING
    return f"{count(report.half_sequence_weight)}, by prediction"
