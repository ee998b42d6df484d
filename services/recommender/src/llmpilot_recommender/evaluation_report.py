"""The results of an evaluation: kept seed by seed in a file, so that a long one resumes, and printed as tables."""

from collections.abc import Mapping, Sequence
from pathlib import Path

from pydantic import BaseModel, TypeAdapter, ValidationError
from rich.console import Console
from rich.table import Table

from llmpilot_contracts.errors import InvalidInputError, PreconditionError, Violation
from llmpilot_recommender.dataset import Dataset
from llmpilot_recommender.evaluation import (
    TRUTHS,
    SeedResult,
    grid_means,
    grid_scenarios,
    paper_scenario,
    spread,
    true_curves,
)
from llmpilot_recommender.published import with_references
from llmpilot_recommender.scores import Curves, Prices, Score, best_static_policy, score_curves
from llmpilot_servicekit.file_output import write_whole

LARGEST_STATIC_POD_COUNT = 200
"""One user per pod in the paper's scenario: no static policy needs more."""


class ReportFile(BaseModel):
    """What is kept."""

    inputs: str
    """What the results depend on; others do not go with them."""
    results: list[SeedResult]


class Report:
    """The results so far, written to a file after each seed if there is one."""

    def __init__(self, inputs: str, results: Sequence[SeedResult], path: Path | None) -> None:
        self._file = ReportFile(inputs=inputs, results=list(results))
        self._path = path

    @classmethod
    def resumed(cls, path: Path | None, inputs: str) -> "Report":
        """Return the report that a file holds, an empty one if there is none yet."""
        if path and (path.is_dir() or not path.parent.is_dir()):
            raise PreconditionError(f"--out must be a file in a folder that exists, is {path}")
        if path is None or not path.exists():
            return cls(inputs, [], path)
        try:
            file = TypeAdapter(ReportFile).validate_json(path.read_bytes())
        except ValidationError as error:
            raise InvalidInputError(
                [Violation("--out", f"{path} is not an evaluation of this version; name another file")]
            ) from error
        if file.inputs != inputs:
            raise PreconditionError(f"{path} evaluates {file.inputs}; this is {inputs}; name another --out")
        return cls(inputs, file.results, path)

    @property
    def results(self) -> tuple[SeedResult, ...]:
        """By seed."""
        return tuple(sorted(self._file.results, key=lambda result: result.seed))

    def holds(self, seed: int) -> bool:
        """Return whether this seed is done."""
        return any(result.seed == seed for result in self._file.results)

    def add(self, result: SeedResult) -> None:
        """Keep one more result."""
        self._file.results.append(result)
        if self._path:
            write_whole(self._path, self._file.model_dump_json(indent=1).encode() + b"\n")


def print_report(
    report: Report, dataset: Dataset, methods: Mapping[str, Curves], prices: Prices, console: Console
) -> None:
    """Print the scores of the method, over seeds, and of the published predictions beside it."""
    console.print(
        "S success rate, O mean overspend of the successes, SO their harmonic mean (Eqs. 5-7);"
        " loss: overspend capped at 1, a failure counts 1. Mean ± standard deviation over seeds."
        f" Dataset {dataset.version}.",
        highlight=False,
    )
    truth = true_curves(dataset)
    for name, error_rate in TRUTHS.items():
        for table in (_paper_table, _grid_table):
            console.print(table(name, error_rate, report=report, truth=truth, methods=methods, prices=prices))


def _paper_table(
    name: str, error_rate: float, *, report: Report, truth: Curves, methods: Mapping[str, Curves], prices: Prices
) -> Table:
    scenario = paper_scenario(error_rate)
    table = _table(f"Paper's scenario (200 users, nTTFT 100 ms, ITL 50 ms), {_truth_words(name)}", "LLMs")
    for result in report.results:
        _add(table, f"this project, seed {result.seed}", [result.paper[name]])
    if len(report.results) > 1:
        _add(table, "this project, all seeds", [result.paper[name] for result in report.results], style="bold")
    for method, predicted in methods.items():
        curves = with_references(method, predicted, truth)
        _add(table, f"published {method}", [score_curves(curves, truth, scenario, prices)])
    policy, static = best_static_policy(truth, scenario, prices, largest_pod_count=LARGEST_STATIC_POD_COUNT)
    _add(table, f"static policy, {policy.pod_count} pods of {policy.gpu_profile}", [static])
    _add(table, "oracle", [score_curves(truth, truth, scenario, prices)])
    return table


def _add(table: Table, method: str, scores: Sequence[Score], *, style: str | None = None) -> None:
    table.add_row(
        method,
        str(scores[0].llm_count),
        *(
            _spread_words([value for score in scores if (value := getattr(score, column)) is not None])
            for column in ("success_rate", "overspend", "so", "loss")
        ),
        style=style,
    )


def _grid_table(
    name: str, error_rate: float, *, report: Report, truth: Curves, methods: Mapping[str, Curves], prices: Prices
) -> Table:
    scenarios = grid_scenarios(error_rate)
    table = _table(f"Mean over the grid of {len(scenarios)} scenarios, {_truth_words(name)}", "scenarios")
    rows: dict[str, list[Sequence[Score]]] = {}
    if report.results:
        rows["this project, trained for each limit"] = [result.grid[name] for result in report.results]
        rows["this project, trained for the paper's limits"] = [result.grid_single[name] for result in report.results]
    for method, predicted in methods.items():
        curves = with_references(method, predicted, truth)
        rows[f"published {method}"] = [[score_curves(curves, truth, scenario, prices) for scenario in scenarios]]
    for method, runs in rows.items():
        means = [dict(grid_means(run)) for run in runs]
        counted = sum(1 for score in runs[0] if score.llm_count)
        table.add_row(method, str(counted), *(_spread_words([mean[column] for mean in means]) for column in means[0]))
    return table


def _table(title: str, count: str) -> Table:
    table = Table("method", title=title, title_justify="left")
    for column in (count, "S", "O", "SO", "loss"):
        table.add_column(column, justify="right")
    return table


def _truth_words(name: str) -> str:
    return "truth as published" if name == "published" else "clean truth: at most 1 % failed requests"


def _spread_words(values: Sequence[float]) -> str:
    if not values:
        return "-"
    mean, deviation = spread(values)
    return f"{mean:.3f} ± {deviation:.3f}" if len(values) > 1 else f"{mean:.3f}"
