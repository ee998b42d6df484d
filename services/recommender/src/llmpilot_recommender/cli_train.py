"""`llm-pilot train` and `llm-pilot evaluate`: make a performance model, and find out how good the method is."""

import hashlib
import importlib.metadata
import os
from collections.abc import Mapping
from datetime import UTC, datetime
from operator import itemgetter
from pathlib import Path

import click
from rich.console import Console

from llmpilot_contracts.errors import InvalidInputError
from llmpilot_perfmodel.gpu_catalogue import load_catalogue
from llmpilot_perfmodel.prices import load_prices
from llmpilot_recommender.dataset import Dataset
from llmpilot_recommender.dataset_file import BUNDLED_DATASET, read_dataset
from llmpilot_recommender.decision import LatencyLimits
from llmpilot_recommender.evaluation import PAPER_LIMITS, Evaluation
from llmpilot_recommender.evaluation_report import Report, print_report
from llmpilot_recommender.measured_llms import load_measured_llms
from llmpilot_recommender.model_store import save_model
from llmpilot_recommender.published import read_published
from llmpilot_recommender.training import Grid, select_hyperparameters, train_all, training_set
from llmpilot_servicekit.file_output import make_folder
from llmpilot_servicekit.progress import shown_progress

_dataset_option = click.option(
    "--dataset",
    "dataset_path",
    type=click.Path(path_type=Path),
    default=BUNDLED_DATASET,
    help="Dataset file.  [default: the bundled one]",
)
_gpus_option = click.option("--gpus", type=click.Path(path_type=Path), help="CSV file that adds or overrides GPUs.")


@click.command()
@_dataset_option
@_gpus_option
@click.option("--nttft-ms", type=float, default=PAPER_LIMITS.nttft_ms, show_default=True, help="Limit to aim at.")
@click.option("--itl-ms", type=float, default=PAPER_LIMITS.itl_ms, show_default=True, help="Limit to aim at.")
@click.option("--seed", type=click.IntRange(0, 2**31 - 1), default=42, show_default=True)
@click.option("--out", required=True, type=click.Path(path_type=Path), help="Folder to write the model to.")
def train(*, dataset_path: Path, gpus: Path | None, nttft_ms: float, itl_ms: float, seed: int, out: Path) -> None:
    """Train the performance model; serve it with LLMPILOT_MODEL=FOLDER."""
    limits = LatencyLimits(nttft_ms=nttft_ms, itl_ms=itl_ms)
    if violations := limits.violations():
        raise InvalidInputError(violations)
    dataset = Dataset(read_dataset(dataset_path).measurements)
    specs = {name: llm.spec for name, llm in load_measured_llms().items()}
    profiles = {profile.name: profile for profile in load_catalogue(gpus).profiles()}
    data = training_set(dataset, specs, profiles)
    make_folder(out)
    with shown_progress("trainings of the cross-validation") as advance:
        parameters, error = select_hyperparameters(data, limits, grid=Grid(), seed=seed, progress=advance)
    manifest = save_model(
        out,
        train_all(data, limits, parameters, seed),
        create_time=datetime.now(UTC),
        software_version=importlib.metadata.version("llm-pilot-recommender"),
        dataset_version=dataset.version,
        limits={"nttft_ms": nttft_ms, "itl_ms": itl_ms},
        seed=seed,
        hyperparameters=parameters,
        features=data.schema.names,
        users_counts=dataset.users_counts,
        training_llms=data.llm_names,
        metrics={"cross_validated_weighted_mape": error},
    )
    click.echo(f"{manifest.name} written to {out}: cross-validated weighted MAPE {error:.3f}, {parameters}")


@click.command()
@_dataset_option
@_gpus_option
@click.option("--prices", type=click.Path(path_type=Path), help="CSV price table.  [default: the bundled one]")
@click.option("--seeds", type=click.IntRange(1, 1000), default=5, show_default=True, help="How many random seeds.")
@click.option(
    "--published", type=click.Path(path_type=Path), help="Folder of published predictions to score beside the method."
)
@click.option(
    "--out",
    type=click.Path(path_type=Path),
    help="JSON file for the results; a later run with the same file goes on after the seeds it holds.",
)
def evaluate(
    *, dataset_path: Path, gpus: Path | None, prices: Path | None, seeds: int, published: Path | None, out: Path | None
) -> None:
    """Evaluate the paper's method by nested leave-one-LLM-out, over seeds, limits and two truths."""
    dataset = Dataset(read_dataset(dataset_path).measurements)
    methods = read_published(published) if published else {}
    price_of = {name: price.price_per_hour for name, price in load_prices(prices).items()}
    profiles = {profile.name: profile for profile in load_catalogue(gpus).profiles()}
    inputs = f"dataset {dataset.version}, prices {_digest(price_of)}, GPUs {_digest(profiles)}"
    report = Report.resumed(out, inputs)
    evaluation = Evaluation(
        dataset,
        {name: llm.spec for name, llm in load_measured_llms().items()},
        profiles,
        price_of,
        grid=Grid(),
        worker_count=os.cpu_count() or 1,
    )
    for seed in range(seeds):
        if not report.holds(seed):
            with shown_progress(f"seed {seed} of {seeds}, steps") as advance:
                report.add(evaluation.run(seed, advance))
    print_report(report, dataset, methods, price_of, Console(width=None if os.isatty(1) else 120))


def _digest(figures: Mapping[str, object]) -> str:
    return hashlib.sha256(repr(sorted(figures.items(), key=itemgetter(0))).encode()).hexdigest()[:12]
