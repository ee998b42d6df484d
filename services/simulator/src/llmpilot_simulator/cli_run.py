"""`llm-pilot simulate run`: a ladder of simulated load tests, as a table and as curves."""

import contextlib
import gc
from collections.abc import Iterator
from pathlib import Path

import click

from llmpilot_simulator.cli_options import deployment_options

DEFAULT_USERS = "1,2,4,8,16,32,64,128"


@click.command()
@deployment_options
@click.option(
    "--gpu", "gpu_profiles", required=True, multiple=True, metavar="PROFILE", help="E.g. 1xA100-40GB; repeatable."
)
@click.option(
    "--users", default=DEFAULT_USERS, show_default=True, help="Concurrent users, a load test for each number."
)
@click.option("--duration", default=120.0, show_default=True, help="Length of a load test in simulated seconds.")
@click.option(
    "--requests",
    "requests_file",
    type=click.Path(path_type=Path),
    help="CSV file of input_tokens, output_tokens and count.  [default: the published load tests]",
)
@click.option("--input-tokens", type=int, help="Every prompt has this many; goes with --output-tokens.")
@click.option("--output-tokens", type=int, help="Every reply has this many.")
@click.option("--seed", default=0, show_default=True, help="Of the order of the requests.")
@click.option("--prices", type=click.Path(path_type=Path), help="CSV file: gpu_profile,price_per_hour.")
@click.option("--plot", type=click.Path(path_type=Path), help="Draw the curves into a .png or .svg file, too.")
@click.option("--records", type=click.Path(path_type=Path), help="Write every request to a Parquet file.")
@click.option("--explain", is_flag=True, help="Say where the memory goes.")
@click.option("--json", "as_json", is_flag=True, help="Print JSON instead.")
def run(
    *,
    llm: str,
    policy: str,
    max_batch_weight: int | None,
    precision: str | None,
    gpus: Path | None,
    gpu_profiles: tuple[str, ...],
    users: str,
    duration: float,
    requests_file: Path | None,
    input_tokens: int | None,
    output_tokens: int | None,
    seed: int,
    prices: Path | None,
    plot: Path | None,
    records: Path | None,
    explain: bool,
    as_json: bool,
) -> None:
    """Show TTFT, ITL and throughput by concurrent users, simulated."""
    with _no_collections():
        from llmpilot_simulator.deployment import DeploymentRequest  # noqa: PLC0415 the compiler takes its time
        from llmpilot_simulator.ladder_report import RunRequest, run_ladders  # noqa: PLC0415

        run_ladders(
            RunRequest(
                deployments=tuple(
                    DeploymentRequest(
                        llm=llm,
                        gpu_profile=gpu_profile,
                        policy=policy,
                        max_batch_weight=max_batch_weight,
                        precision=precision,
                        gpus=gpus,
                    )
                    for gpu_profile in dict.fromkeys(gpu_profiles)
                ),
                users=users,
                duration_seconds=duration,
                requests_file=requests_file,
                input_tokens=input_tokens,
                output_tokens=output_tokens,
                seed=seed,
                prices=prices,
                plot=plot,
                records=records,
                explain=explain,
                as_json=as_json,
            )
        )


@contextlib.contextmanager
def _no_collections() -> Iterator[None]:
    """Do without garbage collections: they take a tenth of a second, most of it at imports, and find nothing."""
    was_enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if was_enabled:
            gc.enable()
