"""What `llm-pilot simulate run` does: simulate the ladder of each GPU profile, print it, write what was asked for.

Invariant: nothing is simulated before everything asked for is known to be valid, and every output says "simulated".
"""

import json
import os
import sys
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import click
from rich.console import Console
from rich.table import Table

from llmpilot_contracts.errors import InvalidInputError, Violation
from llmpilot_perfmodel.batching.records import RequestRecords
from llmpilot_perfmodel.prices import load_prices
from llmpilot_servicekit.file_output import write_whole
from llmpilot_servicekit.progress import noted_if_slow, shown_progress
from llmpilot_simulator.curves import figure_file, number_text, terminal_curves
from llmpilot_simulator.deployment import COMPILING, Deployment, DeploymentRequest, deploy
from llmpilot_simulator.ladder import Ladder, level, simulate_levels
from llmpilot_simulator.request_lengths import RequestLengths, bundled_lengths, fixed_lengths, read_lengths

WIDTH_OFF_TERMINAL = 120
PLOT_FORMATS = (".png", ".svg")
LARGEST_USERS_COUNT = 100_000
LONGEST_SECONDS = 86_400.0
LARGEST_TOKEN_COUNT = 1_000_000_000


@dataclass(frozen=True, slots=True, kw_only=True)
class RunRequest:
    """The options of the command."""

    deployments: tuple[DeploymentRequest, ...]
    users: str
    duration_seconds: float
    requests_file: Path | None
    input_tokens: int | None
    output_tokens: int | None
    seed: int
    prices: Path | None
    plot: Path | None
    records: Path | None
    explain: bool
    as_json: bool


@dataclass(frozen=True, slots=True, kw_only=True)
class _Simulated:
    deployment: Deployment
    ladder: Ladder
    records: tuple[RequestRecords, ...]


def run_ladders(request: RunRequest) -> None:
    """Simulate, print and write; raises InvalidInputError with every wrong option."""
    violations = _violations(request)
    users_counts = _users_counts(request.users, violations)
    lengths = _lengths(request, violations)
    if violations or lengths is None:
        raise InvalidInputError(violations)
    prices = {name: price.price_per_hour for name, price in load_prices(request.prices).items()}
    deployments = [deploy(wanted) for wanted in request.deployments]
    found = [_simulate(deployment, lengths, users_counts, request, prices) for deployment in deployments]
    if request.as_json:
        click.echo(json.dumps([_as_json(simulated) for simulated in found], indent=2))
    else:
        _print(found, explain=request.explain)
    if request.records:
        _write_records(request.records, found)
    if request.plot:
        title = f"{deployments[0].llm_name}, {deployments[0].policy_name}, simulated"
        suffix = request.plot.suffix.removeprefix(".")
        write_whole(
            request.plot, figure_file([simulated.ladder for simulated in found], title=title, file_format=suffix)
        )
        click.echo(f"curves drawn into {request.plot}", err=True)


def _violations(request: RunRequest) -> list[Violation]:
    violations = []
    seconds, plot = request.duration_seconds, request.plot
    if not 0 < seconds <= LONGEST_SECONDS:
        violations.append(Violation("--duration", f"must be > 0 and at most {LONGEST_SECONDS:g}, is {seconds:g}"))
    if request.seed < 0:
        violations.append(Violation("--seed", f"must be >= 0, is {request.seed}"))
    if plot and plot.suffix not in PLOT_FORMATS:
        violations.append(Violation("--plot", f"must end in {' or '.join(PLOT_FORMATS)}, is {plot.name}"))
    for name, path in (("--plot", plot), ("--records", request.records)):
        if path and not (path.parent.is_dir() and os.access(path.parent, os.W_OK)):
            violations.append(Violation(name, f"must be in a folder that can be written, is {path}"))
        elif path and path.is_dir():
            violations.append(Violation(name, f"must be a file, {path} is a folder"))
    return violations


def _users_counts(text: str, violations: list[Violation]) -> tuple[int, ...]:
    counts = []
    for word in map(str.strip, text.split(",")):
        is_count = word.isascii() and word.isdecimal() and len(word) <= len(str(LARGEST_USERS_COUNT))
        if is_count and 1 <= int(word) <= LARGEST_USERS_COUNT:
            counts.append(int(word))
        else:
            limits = f"from 1 to {LARGEST_USERS_COUNT}"
            violations.append(Violation("--users", f"must be whole numbers {limits} between commas, has {word[:20]!r}"))
    return tuple(sorted(set(counts)))


def _lengths(request: RunRequest, violations: list[Violation]) -> RequestLengths | None:
    input_tokens, output_tokens, path = request.input_tokens, request.output_tokens, request.requests_file
    if input_tokens is None and output_tokens is None:
        try:
            return read_lengths(path) if path else bundled_lengths()
        except InvalidInputError as error:
            violations.extend(error.violations)
            return None
    if path:
        violations.append(Violation("--requests", "goes without --input-tokens and --output-tokens"))
    for name, value in (("--input-tokens", input_tokens), ("--output-tokens", output_tokens)):
        if value is None:
            violations.append(Violation(name, "must be given, too: both lengths or none"))
        elif not 1 <= value <= LARGEST_TOKEN_COUNT:
            violations.append(Violation(name, f"must be from 1 to {LARGEST_TOKEN_COUNT}, is {value}"))
    return None if violations or not input_tokens or not output_tokens else fixed_lengths(input_tokens, output_tokens)


def _simulate(
    deployment: Deployment,
    lengths: RequestLengths,
    users_counts: Sequence[int],
    request: RunRequest,
    prices: dict[str, float],
) -> _Simulated:
    with shown_progress(f"load tests of {deployment.name}") as advance, noted_if_slow(COMPILING):
        tests = simulate_levels(
            deployment,
            lengths=lengths,
            users_counts=users_counts,
            duration_seconds=request.duration_seconds,
            seed=request.seed,
            progress=advance,
        )
    ladder = Ladder(
        name=deployment.profile.name,
        levels=tuple(level(count, records) for count, records in zip(users_counts, tests, strict=True)),
        price_per_hour=prices.get(deployment.profile.name),
    )
    return _Simulated(deployment=deployment, ladder=ladder, records=tests)


def _print(found: Sequence[_Simulated], *, explain: bool) -> None:
    console = Console(width=None if sys.stdout.isatty() else WIDTH_OFF_TERMINAL, markup=False, emoji=False)
    for simulated in found:
        console.print(_table(simulated))
        for note in simulated.deployment.notes(explain=explain):
            console.print(note, highlight=False)
    console.out(terminal_curves([simulated.ladder for simulated in found], width=console.width), highlight=False)


def _table(simulated: _Simulated) -> Table:
    table = Table(title=f"{simulated.deployment.name}, {simulated.deployment.policy_name}, simulated")
    for heading in ("users", "TTFT ms", "nTTFT ms", "ITL ms", "ITL p95 ms", "tokens/s", "requests/s", "failed"):
        table.add_column(heading, justify="right")
    for found in simulated.ladder.levels:
        table.add_row(
            str(found.users_count),
            _number(found.ttft_ms_median),
            _number(found.nttft_ms_median),
            _number(found.itl_ms_median),
            _number(found.itl_ms_p95),
            _number(found.tokens_per_second),
            _number(found.requests_per_second),
            "-" if found.error_rate is None else f"{found.error_rate:.1%}",
        )
    return table


def _number(value: float | None) -> str:
    return "-" if value is None else number_text(value)


def _as_json(simulated: _Simulated) -> dict[str, object]:
    return {
        "llm": simulated.deployment.llm_name,
        "gpu_profile": simulated.deployment.profile.name,
        "policy": simulated.deployment.policy_name,
        "origin": "simulated",
        "price_per_hour": simulated.ladder.price_per_hour,
        "notes": simulated.deployment.notes(explain=True),
        "levels": [asdict(found) for found in simulated.ladder.levels],
    }


def _write_records(path: Path, found: Sequence[_Simulated]) -> None:
    from llmpilot_simulator.records_file import LoadTest, records_file  # noqa: PLC0415 pyarrow only where it is needed

    tests: list[LoadTest] = [
        (simulated.deployment.llm_name, simulated.deployment.profile.name, found_level.users_count, records)
        for simulated in found
        for found_level, records in zip(simulated.ladder.levels, simulated.records, strict=True)
    ]
    write_whole(path, records_file(tests))
    click.echo(f"{sum(len(records) for *_, records in tests):,} requests written to {path}", err=True)
