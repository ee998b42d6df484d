from collections.abc import Mapping
from dataclasses import replace
from io import StringIO
from pathlib import Path

import pytest
from rich.console import Console

from llmpilot_contracts.errors import InvalidInputError, PreconditionError
from llmpilot_perfmodel.gpu_catalogue import load_catalogue
from llmpilot_perfmodel.prices import load_prices
from llmpilot_recommender.dataset import Dataset
from llmpilot_recommender.decision import LatencyLimits
from llmpilot_recommender.evaluation import (
    PAPER_LIMITS,
    Evaluation,
    SeedResult,
    grid_means,
    grid_scenarios,
    spread,
    true_curves,
)
from llmpilot_recommender.evaluation_report import Report, print_report
from llmpilot_recommender.measured_llms import load_measured_llms
from llmpilot_recommender.measurement import Quantiles
from llmpilot_recommender.scores import Curves, Score
from llmpilot_recommender.training import Grid, select_hyperparameters, training_set

SPECS = {name: llm.spec for name, llm in load_measured_llms().items()}
PROFILES = {profile.name: profile for profile in load_catalogue().profiles()}
PRICES = {name: price.price_per_hour for name, price in load_prices().items()}
GRID = Grid(tree_counts=(1, 4), max_depths=(2, 3), learning_rates=(0.5,), subsamples=(0.8,), colsamples_bytree=(1.0,))
HELD_OUT = "llama-13b"
SEED = 3


def evaluation_of(dataset: Dataset) -> Evaluation:
    return Evaluation(dataset, SPECS, PROFILES, PRICES, grid=GRID, worker_count=2)


def run(dataset: Dataset, seed: int = SEED) -> SeedResult:
    return evaluation_of(dataset).run(seed, lambda _done, _total: None)


@pytest.fixture(scope="module")
def result(small_dataset: Dataset) -> SeedResult:
    return run(small_dataset)


@pytest.fixture(scope="module")
def perturbed(small_dataset: Dataset) -> Dataset:
    """The same, but for the held-out LLM's latencies."""
    return Dataset(
        row
        if row.llm != HELD_OUT
        else replace(row, nttft=Quantiles(median_ms=1e5 / row.users_count), itl=Quantiles(median_ms=7e4))
        for row in small_dataset.measurements
    )


def predictions(dataset: Dataset, result: SeedResult, limits: LatencyLimits) -> Curves:
    return evaluation_of(dataset)._predict(result.hyperparameters, limits, SEED)


@pytest.mark.parametrize("limits", [PAPER_LIMITS, LatencyLimits(nttft_ms=25, itl_ms=100)])
def test_nothing_measured_on_an_llm_reaches_the_predictions_for_it(
    small_dataset: Dataset, perturbed: Dataset, result: SeedResult, limits: LatencyLimits
) -> None:
    wild = run(perturbed)
    assert wild.hyperparameters[HELD_OUT] == result.hyperparameters[HELD_OUT]
    before, after = predictions(small_dataset, result, limits), predictions(perturbed, wild, limits)
    assert after[HELD_OUT] == before[HELD_OUT]
    assert after["llama-7b"] != before["llama-7b"]  # which learns from it


def test_choice_for_an_llm_is_that_of_leaving_out_each_of_the_others(
    small_dataset: Dataset, result: SeedResult
) -> None:
    """The pairs that share a training give what the plain nested loop gives."""
    for llm in small_dataset.llms:
        # The columns stay those of all LLMs: a column that is constant in training changes no split.
        data = training_set(small_dataset, SPECS, PROFILES)
        others = data.llms != llm
        inner = replace(
            data,
            features=data.features[others],
            latencies_ms=data.latencies_ms[others],
            llms=data.llms[others],
            curve_ids=data.curve_ids[others],
        )
        chosen, _ = select_hyperparameters(inner, PAPER_LIMITS, grid=GRID, seed=SEED, progress=lambda *_: None)
        assert result.hyperparameters[llm] == chosen


def test_result_covers_both_truths_and_the_whole_grid(small_dataset: Dataset, result: SeedResult) -> None:
    assert set(result.hyperparameters) == set(small_dataset.llms)
    assert set(result.paper) == set(result.grid) == {"published", "clean"}
    assert [len(scores) for scores in result.grid.values()] == [75, 75]


def test_paper_scenario_is_also_one_of_the_grid(result: SeedResult) -> None:
    for name, rate in (("published", 1.0), ("clean", 0.01)):
        scenarios = grid_scenarios(rate)
        asked = [(each.limits.nttft_ms, each.limits.itl_ms, each.users_count) for each in scenarios]
        index = asked.index((100, 50, 200))
        assert result.grid[name][index] == result.paper[name]
        assert scenarios[index].limits.error_rate == rate


def test_same_seed_gives_the_same_result(small_dataset: Dataset, result: SeedResult) -> None:
    assert run(small_dataset) == result


def test_progress_counts_every_step_up_to_the_total(small_dataset: Dataset) -> None:
    steps: list[tuple[int, int]] = []
    evaluation_of(small_dataset).run(SEED, lambda done, total: steps.append((done, total)))
    assert steps == [(done, 31) for done in range(1, 32)]  # 6 pairs of 4 LLMs and 5 x 5 limits


def test_every_profile_without_a_description_or_a_price_is_named(small_dataset: Dataset) -> None:
    first, *_ = small_dataset.measurements
    dataset = small_dataset.with_measurement(replace(first, gpu_profile="1xUnknown-1GB"))
    prices = {name: price for name, price in PRICES.items() if name != "1xH100-80GB"}
    with pytest.raises(InvalidInputError) as caught:
        Evaluation(dataset, SPECS, PROFILES, prices, grid=GRID, worker_count=1)
    text = str(caught.value)
    assert "1xUnknown-1GB" in text
    assert "1xH100-80GB" in text
    assert "1xA100-40GB" not in text


def test_llm_without_a_description_is_named(small_dataset: Dataset) -> None:
    first, *_ = small_dataset.measurements
    dataset = small_dataset.with_measurement(replace(first, llm="nobody/knows"))
    with pytest.raises(InvalidInputError, match="nobody/knows"):
        evaluation_of(dataset)


def test_truth_keeps_error_rates_and_calls_unknown_latencies_infinite(small_dataset: Dataset) -> None:
    first, *_ = small_dataset.measurements
    dataset = Dataset([replace(first, itl=Quantiles(), request_count=10, error_count=10)])
    ((point,),) = true_curves(dataset)[first.llm].values()
    assert point.itl_ms == float("inf")
    assert point.error_rate == 1


def test_spread_is_mean_and_sample_deviation() -> None:
    assert spread([2.0, 4.0, 9.0]) == pytest.approx((5.0, 13**0.5))  # variance (9 + 1 + 16) / 2
    assert spread([0.7]) == (0.7, 0.0)


def test_grid_means_leave_out_what_is_not_known() -> None:
    scores = [
        Score(llm_count=2, success_rate=1, overspend=0.5, loss=0.5),
        Score(llm_count=2, success_rate=0, overspend=None, loss=1),
        Score(llm_count=0, success_rate=0, overspend=None, loss=0),
    ]
    # SO of the first: 2 x 1 x 0.5 / 1.5 = 2/3; of the second 0; the third has no LLM.
    assert dict(grid_means(scores)) == pytest.approx({"success_rate": 0.5, "overspend": 0.5, "so": 1 / 3, "loss": 0.75})


def test_report_resumes_after_the_seeds_it_holds(tmp_path: Path, result: SeedResult) -> None:
    path = tmp_path / "report.json"
    report = Report.resumed(path, "1-abc")
    assert not report.holds(SEED)
    assert report.results == ()
    report.add(result)
    resumed = Report.resumed(path, "1-abc")
    assert resumed.holds(SEED)
    assert not resumed.holds(SEED + 1)
    assert resumed.results == (result,)
    assert [entry.name for entry in tmp_path.iterdir()] == ["report.json"]


def test_results_come_by_seed(result: SeedResult) -> None:
    report = Report("1-abc", [], None)
    for seed in (2, 0, 1):
        report.add(replace(result, seed=seed))
    assert [entry.seed for entry in report.results] == [0, 1, 2]


def test_report_of_another_dataset_is_refused(tmp_path: Path, result: SeedResult) -> None:
    path = tmp_path / "report.json"
    Report.resumed(path, "1-abc").add(result)
    with pytest.raises(PreconditionError, match=r"evaluates 1-abc; this is 1-def"):
        Report.resumed(path, "1-def")


@pytest.mark.parametrize("content", ["", "{", "[]", '{"inputs": "1-abc"}', '{"inputs": 1, "results": []}'])
def test_file_that_is_no_report_is_refused_and_left_alone(tmp_path: Path, content: str) -> None:
    path = tmp_path / "report.json"
    path.write_text(content)
    with pytest.raises(InvalidInputError, match="not an evaluation"):
        Report.resumed(path, "1-abc")
    assert path.read_text() == content


def test_printed_report_names_every_method_and_the_oracle_scores_one(
    small_dataset: Dataset, result: SeedResult
) -> None:
    out = StringIO()
    report = Report(small_dataset.version, [result, replace(result, seed=SEED + 1)], None)
    methods: Mapping[str, Curves] = {"Mine": true_curves(small_dataset)}
    print_report(report, small_dataset, methods, PRICES, Console(file=out, width=140))
    lines = out.getvalue().splitlines()
    for words in ("this project, seed 3", "this project, seed 4", "this project, all seeds", "static policy"):
        assert any(words in line for line in lines)
    for words in ("oracle", "published Mine"):
        (line, *_) = (line for line in lines if words in line)
        assert line.count("1.000") == 2  # S and SO
    assert small_dataset.version in out.getvalue()
