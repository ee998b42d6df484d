import csv
from pathlib import Path

import pytest

from llmpilot_contracts.errors import InvalidInputError
from llmpilot_recommender.decision import CurvePoint
from llmpilot_recommender.evaluation import PUBLISHED_ERROR_RATE, paper_scenario, true_curves
from llmpilot_recommender.knowledge import Knowledge
from llmpilot_recommender.published import read_published, with_references
from llmpilot_recommender.scores import Curves, best_static_policy, score_curves

HEADER = "model,gpu,num_users,prediction_median_nttft,prediction_median_itl\n"
LARGEST_POD_COUNT = 40
"""The published policies go up to 35 pods."""


def test_published_scores_of_all_methods_are_reproduced(bundled_knowledge: Knowledge, public_data: Path) -> None:
    folder = public_data / "llm-pilot" / "expected"
    with (folder / "expected_recommendation_scores.csv").open() as file:
        expected = {
            row[""]: tuple(float(row[name]) for name in ("success_rate", "overspend", "so_score"))
            for row in csv.DictReader(file)
        }
    truth = true_curves(bundled_knowledge.dataset)
    prices = {name: price.price_per_hour for name, price in bundled_knowledge.prices.items()}
    scenario = paper_scenario(PUBLISHED_ERROR_RATE)
    scores = {
        method: score_curves(with_references(method, curves, truth), truth, scenario, prices)
        for method, curves in read_published(folder).items()
    }
    policy, scores["Static policy"] = best_static_policy(truth, scenario, prices, largest_pod_count=LARGEST_POD_COUNT)
    assert len(expected) == 8
    assert {
        method: pytest.approx((100 * s.success_rate, 100 * (s.overspend or 0), s.so), abs=5e-4)
        for method, s in scores.items()
    } == expected
    assert (policy.gpu_profile, policy.pod_count) == ("1xA100-40GB", 4)


def test_methods_are_named_after_their_files_and_curves_ascend(tmp_path: Path) -> None:
    (tmp_path / "expected_predictions_Mine.csv").write_text(HEADER + "llm,2 x A100,8,3.5,20\nllm,2 x A100,1,1.5,10\n")
    (tmp_path / "other.csv").write_text("x\n")
    assert read_published(tmp_path) == {
        "Mine": {
            "llm": {
                "2xA100-40GB": [
                    CurvePoint(users_count=1, nttft_ms=1.5, itl_ms=10, error_rate=None),
                    CurvePoint(users_count=8, nttft_ms=3.5, itl_ms=20, error_rate=None),
                ]
            }
        }
    }


def test_folder_without_predictions_is_refused(tmp_path: Path) -> None:
    for folder in (tmp_path, tmp_path / "nowhere"):
        with pytest.raises(InvalidInputError, match="holds no expected_predictions_"):
            read_published(folder)


def test_all_missing_columns_are_named(tmp_path: Path) -> None:
    (tmp_path / "expected_predictions_Mine.csv").write_text("model,num_users\nllm,1\n")
    with pytest.raises(InvalidInputError) as caught:
        read_published(tmp_path)
    assert len(caught.value.violations) == 3


@pytest.mark.parametrize(
    "row", ["llm,2 x A100,eight,1,1", "llm,2 x A100,8", "llm,A100,8,1,1", "llm,2 x A100,8,fast,1", "llm,2 x B200,8,1,1"]
)
def test_mistyped_line_is_named(tmp_path: Path, row: str) -> None:
    (tmp_path / "expected_predictions_Mine.csv").write_text(f"{HEADER}llm,2 x A100,1,1,1\n{row}\n")
    with pytest.raises(InvalidInputError, match=r"expected_predictions_Mine\.csv row 2"):
        read_published(tmp_path)


def test_rivals_keep_their_word_where_the_truth_holds_nothing() -> None:
    predicted: Curves = {"llm": {"1xT4-16GB": [CurvePoint(users_count=1, nttft_ms=1, itl_ms=1, error_rate=None)]}}
    truth: Curves = {"other": {}}
    assert with_references("PARIS", predicted, truth) == predicted
    assert truth == {"other": {}}


def test_file_that_is_no_text_is_refused(tmp_path: Path) -> None:
    (tmp_path / "expected_predictions_Mine.csv").write_bytes(b"\xff\xfe")
    with pytest.raises(InvalidInputError, match="must be a CSV file"):
        read_published(tmp_path)


def test_rivals_that_measure_decide_on_measurements_of_the_reference_profiles() -> None:
    def curves(itl_ms: float) -> Curves:
        point = CurvePoint(users_count=1, nttft_ms=1, itl_ms=itl_ms, error_rate=None)
        return {"llm": {"1xT4-16GB": [point], "4xH100-80GB": [point], "1xA100-40GB": [point]}}

    predicted, truth = curves(1), curves(2)
    decided = with_references("PARIS", predicted, truth)["llm"]
    assert {profile: points[0].itl_ms for profile, points in decided.items()} == {
        "1xT4-16GB": 2,
        "4xH100-80GB": 2,
        "1xA100-40GB": 1,
    }
    assert with_references("LLM-Pilot", predicted, truth) == predicted
