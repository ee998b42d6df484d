"""Options and outputs that several subcommands share."""

import os
import shlex
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import click

from llmpilot_contracts.errors import InvalidInputError, Violation
from llmpilot_workload_generator.fitting.bins import FEWEST_BINS, MOST_BINS
from llmpilot_workload_generator.model import ArrivalKind, Arrivals, Bins, WorkloadModel

Callback = Callable[..., None]

_ARRIVAL_OPTIONS = (
    click.option(
        "--arrivals",
        "arrival_kind",
        type=click.Choice([kind.value for kind in ArrivalKind]),
        help="When requests are sent.  [default: the model's own; closed when it is fitted]",
    ),
    click.option("--rate", type=float, help="Mean requests per second of constant, poisson and gamma arrivals."),
    click.option("--burstiness", type=float, help="Of gamma arrivals: 1 is Poisson, less is burstier.  [default: 1]"),
    click.option("--speed", type=float, help="How many times faster a trace's arrivals are replayed.  [default: 1]"),
)


def arrival_options(callback: Callback) -> Callback:
    """Add the options of an arrival process to a command's function."""
    for option in reversed(_ARRIVAL_OPTIONS):
        callback = option(callback)
    return callback


def read_arrivals(
    kind: str | None,
    *,
    rate: float | None,
    burstiness: float | None,
    speed: float | None,
    violations: list[Violation],
) -> Arrivals | None:
    """Return the arrival process that the options name, None where they name none; append options without effect."""
    used = {
        ArrivalKind.CONSTANT: {"--rate"},
        ArrivalKind.POISSON: {"--rate"},
        ArrivalKind.GAMMA: {"--rate", "--burstiness"},
        ArrivalKind.TRACE: {"--speed"},
    }
    chosen = ArrivalKind(kind) if kind else None
    allowed = used.get(chosen, set()) if chosen else set()
    for name, value in (("--rate", rate), ("--burstiness", burstiness), ("--speed", speed)):
        if value is not None and name not in allowed:
            kinds = " or ".join(f"--arrivals {known.value}" for known, names in used.items() if name in names)
            violations.append(Violation(name, f"goes with {kinds}"))
    if chosen is None:
        return None
    if "--rate" in allowed and rate is None:
        violations.append(Violation("--rate", f"is needed by --arrivals {chosen.value}"))
    for name, value in (("--rate", rate), ("--burstiness", burstiness), ("--speed", speed)):
        if name in allowed and value is not None and not 0 < value < float("inf"):
            violations.append(Violation(name, f"must be > 0, is {value:g}"))
    return Arrivals(
        kind=chosen,
        rate_per_second=rate or 0.0,
        burstiness=1.0 if burstiness is None else burstiness,
        speed=1.0 if speed is None else speed,
    )


def pairs(option: str, texts: Iterable[str], violations: list[Violation]) -> dict[str, str]:
    """Return what "name=value" texts say; append those that say nothing, and names that are given twice."""
    found: dict[str, str] = {}
    for text in texts:
        name, equals, value = (part.strip() for part in text.partition("="))
        if not equals or not name or not value:
            violations.append(Violation(option, f"must be NAME=VALUE, is {text!r}"))
        elif name in found:
            violations.append(Violation(option, f"must name {name} once"))
        else:
            found[name] = value
    return found


def names(text: str) -> tuple[str, ...]:
    """Return the names between the commas of a text."""
    return tuple(name.strip() for name in text.split(",") if name.strip())


def output_violations(option: str, path: Path, *, inputs: Iterable[Path] = ()) -> list[Violation]:
    """Say why a file cannot be written, or must not, being among the inputs, before hours are spent on its content."""
    if path.is_dir():
        return [Violation(option, f"must be a file, {path} is a folder")]
    for source in inputs:
        if path.resolve() == source.resolve():
            return [Violation(option, f"must be another file than {path}, which is read and would be lost")]
        if source.resolve() in path.resolve().parents:
            return [Violation(option, f"must be outside of {source}, whose files are read as parts of a trace")]
    if not (path.parent.is_dir() and os.access(path.parent, os.W_OK)):
        return [Violation(option, f"must be in a folder that can be written, is {path}")]
    return []


def refuse(violations: list[Violation]) -> None:
    """Raise InvalidInputError if there is anything wrong."""
    if violations:
        raise InvalidInputError(violations)


def open_model(name: str) -> WorkloadModel:
    """Return the model in a file, or the named profile; raises NotFoundError that lists the profiles."""
    from llmpilot_contracts.errors import NotFoundError  # noqa: PLC0415
    from llmpilot_workload_generator.files.model_file import read_model  # noqa: PLC0415 the compiler takes half a second
    from llmpilot_workload_generator.profiles import PROFILE_NAMES, load_profile  # noqa: PLC0415

    if Path(name).is_file():
        return read_model(Path(name))
    if name in PROFILE_NAMES:
        return load_profile(name)
    raise NotFoundError("workload model", name, hint=f"name a file, or a profile: {', '.join(PROFILE_NAMES)}")


def open_edges(path: Path) -> tuple[Bins, ...]:
    """Return the bins in an edges or model file, or those of the named profile."""
    from llmpilot_workload_generator.files.edges_file import read_edges  # noqa: PLC0415 the compiler takes half a second
    from llmpilot_workload_generator.profiles import PROFILE_NAMES, load_profile  # noqa: PLC0415

    if str(path) in PROFILE_NAMES and not path.is_file():
        return tuple(parameter.bins for parameter in load_profile(str(path)).parameters)
    return read_edges(path)


def bins_violations(max_bins: int) -> list[Violation]:
    """Say why a parameter could not have so many bins."""
    if FEWEST_BINS <= max_bins <= MOST_BINS:
        return []
    return [Violation("--bins", f"must be {FEWEST_BINS} to {MOST_BINS}, is {max_bins}")]


def command_line(context: click.Context, arguments: dict[str, Any]) -> str:
    """Return the command as a shell takes it, files by their names only."""
    words = context.command_path.split()
    for parameter in context.command.params:
        value = arguments.get(parameter.name or "")
        if parameter.name == "out" or value is None or value == parameter.default or value in {(), False}:
            continue
        for item in value if isinstance(value, tuple) else (value,):
            text = item.name if isinstance(item, Path) else str(item)
            name = [] if isinstance(parameter, click.Argument) else [parameter.opts[0]]
            words += name if item is True else [*name, text]
    return shlex.join(words)
