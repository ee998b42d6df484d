"""`llm-pilot workload sample`: draw requests from a model, with or without their prompts."""

from collections.abc import Iterable
from pathlib import Path

import click

from llmpilot_contracts.errors import InvalidInputError, Violation
from llmpilot_workload_generator.cli_options import (
    arrival_options,
    names,
    open_model,
    output_violations,
    pairs,
    read_arrivals,
    refuse,
)

SHOWN_REQUESTS = 20


@click.command()
@click.argument("model")
@click.option("-n", "--count", type=int, help=f"Requests.  [default: {SHOWN_REQUESTS}, or all of a --replay]")
@click.option(
    "--out",
    type=click.Path(path_type=Path),
    help="A .csv, .jsonl or .parquet file; with --prompts .jsonl.  [default: the terminal]",
)
@click.option("--seed", default=0, show_default=True, help="The same seed gives the same requests.")
@click.option("--start", default=0, show_default=True, help="Index of the first request, to go on with a stream.")
@click.option(
    "--where", "conditions", multiple=True, metavar="CONDITION", help='E.g. "input_tokens <= 874"; repeatable.'
)
@click.option(
    "--values",
    type=click.Choice(["centre", "uniform", "quantiles"]),
    default="centre",
    show_default=True,
    help="Which value of its bin a parameter takes: its mean, any, or as often as in the trace.",
)
@click.option("--independent", is_flag=True, help="Draw every parameter from its own distribution.")
@click.option("--scale", "scales", multiple=True, metavar="NAME=FACTOR", help="Multiply a parameter; repeatable.")
@click.option("--context-length", type=int, help="Cut prompts so that prompt and reply have at most these tokens.")
@click.option("--replay", is_flag=True, help="Give the kept requests of the trace, in their order.")
@arrival_options
@click.option("--parameters", default="", metavar="NAMES", help="What to write, between commas.  [default: all]")
@click.option("--prompts", is_flag=True, help="Write prompts, too.")
@click.option("--tokenizer", type=click.Path(path_type=Path), help="A tokenizer.json.  [default: the service's own]")
@click.option("--corpus", type=click.Path(path_type=Path), help="Text that prompts are cut from.  [default: our own]")
@click.option("--shared-prefix-ratio", default=0.0, show_default=True, help="Share of a prompt that others have, too.")
@click.option("--prefix-groups", default=1, show_default=True, help="Groups of prompts that share a prefix.")
@click.option(
    "--server",
    type=click.Choice(["openai-completions", "openai-chat", "tgi"]),
    help="Write bodies for this server, too.",
)
@click.option("--served-model", default="", help="Name of the served model, for the bodies.")
def sample(
    *,
    model: str,
    count: int | None,
    out: Path | None,
    seed: int,
    start: int,
    conditions: tuple[str, ...],
    values: str,
    independent: bool,
    scales: tuple[str, ...],
    context_length: int | None,
    replay: bool,
    arrival_kind: str | None,
    rate: float | None,
    burstiness: float | None,
    speed: float | None,
    parameters: str,
    prompts: bool,
    tokenizer: Path | None,
    corpus: Path | None,
    shared_prefix_ratio: float,
    prefix_groups: int,
    server: str | None,
    served_model: str,
) -> None:
    """Draw requests from MODEL, a file or a profile."""
    from llmpilot_workload_generator import sample_output  # noqa: PLC0415 the compiler takes half a second
    from llmpilot_workload_generator.sampling.sampler import SampleOptions, Sampler, ValueChoice  # noqa: PLC0415

    violations = output_violations("--out", out) if out else []
    factors = _factors(scales, violations)
    arrivals = read_arrivals(arrival_kind, rate=rate, burstiness=burstiness, speed=speed, violations=violations)
    if count is not None and count < 1:
        violations.append(Violation("--count", f"must be >= 1, is {count}"))
    if start < 0:
        violations.append(Violation("--start", f"must be >= 0, is {start}"))
    has_prompts = prompts or server is not None
    violations += sample_output.violations(out, prompts=has_prompts)
    rendering = sample_output.Rendering(
        seed=seed,
        tokenizer=tokenizer,
        corpus=corpus,
        shared_prefix_ratio=shared_prefix_ratio,
        prefix_group_count=prefix_groups,
        server=server,
        served_model=served_model,
    )
    violations += sample_output.option_violations(rendering, prompts=has_prompts)
    refuse(violations)
    options = SampleOptions(
        seed=seed,
        conditions=conditions,
        value_choice=ValueChoice(values),
        independent=independent,
        scales=factors,
        context_length=context_length,
        arrivals=arrivals,
        replay=replay,
    )
    sampler = renderer = None
    opened = open_model(model)
    written = names(parameters)
    if written and has_prompts:
        violations.append(Violation("--parameters", "goes without --prompts and --server"))
    violations += [
        Violation("--parameters", f"{name!r} is none of the model's: {', '.join(opened.names)}")
        for name in written
        if name not in opened.names
    ]
    try:
        sampler = Sampler(opened, options)
    except InvalidInputError as error:
        violations += error.violations
    try:
        renderer = sample_output.make_renderer(rendering) if has_prompts else None
    except InvalidInputError as error:
        violations += error.violations
    if sampler is None or violations:
        raise InvalidInputError(as_options(violations))
    if count is None:
        count = SHOWN_REQUESTS if sampler.request_count is None else max(sampler.request_count - start, 1)
    try:
        sample_output.write_samples(sampler, start=start, count=count, out=out, renderer=renderer, parameters=written)
    except InvalidInputError as error:
        raise InvalidInputError(as_options(error.violations)) from error


_OPTIONS = {
    "arrivals": "--arrivals",
    "arrivals.burstiness": "--burstiness",
    "arrivals.kind": "--arrivals",
    "arrivals.rate_per_second": "--rate",
    "arrivals.speed": "--speed",
    "conditions": "--where",
    "context_length": "--context-length",
    "corpus": "--corpus",
    "independent": "--independent",
    "prefix_group_count": "--prefix-groups",
    "replay": "--replay",
    "scales": "--scale",
    "seed": "--seed",
    "served_model": "--served-model",
    "shared_prefix_ratio": "--shared-prefix-ratio",
    "start": "--start",
    "tokenizer": "--tokenizer",
    "value_choice": "--values",
}
"""The options that set what the sampler and the renderer call otherwise."""


def as_options(violations: Iterable[Violation]) -> list[Violation]:
    """Return what is wrong under the names that the command line has for it."""
    return [Violation(_OPTIONS.get(one.field, one.field), one.description) for one in violations]


def _factors(texts: tuple[str, ...], violations: list[Violation]) -> dict[str, float]:
    factors = {}
    for name, text in pairs("--scale", texts, violations).items():
        try:
            factors[name] = float(text)
        except ValueError:
            violations.append(Violation("--scale", f"must be a number, {name} is {text!r}"))
    return factors
