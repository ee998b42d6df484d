import json
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import click
import pytest
from click.testing import CliRunner, Result

from llmpilot_contracts.errors import InvalidInputError, PreconditionError, UnavailableError
from llmpilot_recommender.cli_recommend import predict, recommend
from llmpilot_recommender.cli_train import evaluate, train
from llmpilot_recommender.dataset import Dataset
from llmpilot_recommender.dataset_file import BUNDLED_DATASET, write_dataset
from llmpilot_recommender.model_store import load_predictor

LIMITS = ("--users", "200", "--nttft-ms", "100", "--itl-ms", "50")
LLAMA = ("--config", "llama-7b", *LIMITS)
CONFIG = {
    "model_type": "llama",
    "num_hidden_layers": 32,
    "hidden_size": 4096,
    "num_attention_heads": 32,
    "intermediate_size": 11008,
    "vocab_size": 32000,
}

Run = Callable[..., Result]


@dataclass(frozen=True)
class RunningPlatform:
    """A platform on which the recommender runs already."""

    address: str

    @contextmanager
    def address_of(self, service: str, *, beside: Sequence[str] = ()) -> Iterator[str]:  # noqa: ARG002 it runs alone
        """Give the one address there is."""
        assert service == "recommender"
        yield self.address


@pytest.fixture(scope="module")
def run(addresses: dict[str, str]) -> Run:
    """Runs a command against the running recommender."""

    def invoke(command: click.Command, *arguments: str) -> Result:
        return CliRunner().invoke(command, arguments, obj=RunningPlatform(addresses["grpc"]))

    return invoke


@pytest.fixture
def config(tmp_path: Path) -> Path:
    """A config.json of Llama-2-7B's shape."""
    path = tmp_path / "config.json"
    path.write_text(json.dumps(CONFIG))
    return path


def refusal(result: Result) -> InvalidInputError:
    assert isinstance(result.exception, InvalidInputError), result.output
    return result.exception


def test_table_puts_the_cheapest_first_and_says_why_others_are_out(run: Run) -> None:
    # characterization.csv: llama-7b on 1xA100-40GB serves 32 users at 4.09625; on 1xA10-24GB see its own rows.
    result = run(
        recommend, *LLAMA, "--candidate", "1xA100-40GB", "--candidate", "1xH100-80GB", "--candidate", "1xT4-16GB"
    )
    assert result.exception is None
    lines = [line for line in result.output.splitlines() if "x" in line]
    (cheapest,) = (line for line in lines if "cheapest" in line)
    assert "1xA100-40GB" in cheapest
    assert "28.67" in cheapest
    assert "measured" in cheapest
    assert "7 pods on 1xA100-40GB for 28.67 per hour serve 200 users within the limits (measured)." in result.output
    assert any("1xH100-80GB" in line and "meets the limits, measured" in line for line in lines)


def test_json_parses_and_keeps_zeros(run: Run) -> None:
    result = run(recommend, *LLAMA, "--candidate", "1xA100-40GB", "--json")
    answer = json.loads(result.stdout)
    (option,) = answer["options"]
    assert (option["gpuProfile"], option["podCount"], option["basis"]) == ("1xA100-40GB", "7", "BASIS_MEASURED")
    assert option["errorRate"] == 0
    assert answer["rejections"] == []


def test_folder_with_a_config_json_is_enough(run: Run, config: Path) -> None:
    for path in (config, config.parent):
        result = run(recommend, "--config", str(path), *LIMITS, "--json")
        answer = json.loads(result.stdout)
        assert answer["llmSpec"]["parameterCount"] == "6738415616"  # Llama-2-7B's published 6,738,415,616
        assert {option["basis"] for option in answer["options"]} == {"BASIS_PREDICTED"}


def test_named_config_json_gets_the_measurements_of_its_name(run: Run, config: Path) -> None:
    result = run(
        recommend, "--config", str(config), "--name", "llama-7b", *LIMITS, "--candidate", "1xA100-40GB", "--json"
    )
    assert json.loads(result.stdout)["options"][0]["basis"] == "BASIS_MEASURED"


def test_all_candidates_are_the_whole_catalogue(run: Run) -> None:
    answer = json.loads(run(recommend, *LLAMA, "--candidate", "all", "--json").stdout)
    assert len(answer["options"]) + len(answer["rejections"]) == 56


def test_square_brackets_in_a_name_are_printed_as_they_are(run: Run, config: Path) -> None:
    result = run(recommend, "--config", str(config), "--name", "[/red] [bold]x", *LIMITS)
    assert result.exception is None
    assert "[/red] [bold]x" in result.output


def test_predict_prints_a_row_per_load(run: Run) -> None:
    result = run(predict, "--config", "llama-13b", "--gpu-profile", "1xA100-40GB")
    assert result.exception is None
    for users, failed in (("16", "3.6%"), ("64", "79.7%")):
        assert any(users in line.split() and failed in line.split() for line in result.output.splitlines())
    assert "measured" in result.output


def test_predict_as_json(run: Run) -> None:
    answer = json.loads(run(predict, "--config", "llama-7b", "--gpu-profile", "1xA100-40GB", "--json").stdout)
    assert [point["itlMs"] for point in answer["points"]] == [13, 14, 16, 20, 25, 38, 59, 89]


def test_given_price_decides_and_prices_not_given_stay_those_of_the_service(run: Run, tmp_path: Path) -> None:
    prices = tmp_path / "prices.csv"
    prices.write_text("gpu_profile,price_per_hour\n1xH100-80GB,0.01\n")
    arguments = ("--candidate", "1xH100-80GB", "--candidate", "8xMI300X-192GB", "--prices", str(prices), "--json")
    answer = json.loads(run(recommend, *LLAMA, *arguments).stdout)
    price_of = {option["gpuProfile"]: option["podPricePerHour"] for option in answer["options"]}
    assert price_of == {"1xH100-80GB": 0.01, "8xMI300X-192GB": 1234.5}
    assert answer["options"][0]["gpuProfile"] == "1xH100-80GB"


@pytest.mark.parametrize("content", ["gpu_profile\n1xT4-16GB\n", "gpu_profile,price_per_hour\n1xT4-16GB,-1\n", None])
def test_bad_price_file_is_refused_by_its_name(run: Run, tmp_path: Path, content: str | None) -> None:
    prices = tmp_path / "prices.csv"
    if content is not None:
        prices.write_text(content)
    assert "prices.csv" in str(refusal(run(recommend, *LLAMA, "--prices", str(prices))))


def test_missing_config_is_refused_by_its_path(run: Run, tmp_path: Path) -> None:
    for path in (tmp_path / "config.json", tmp_path):
        error = refusal(run(recommend, "--config", str(path), *LIMITS))
        assert [violation.field for violation in error.violations] == ["--config"]
        assert "config.json cannot be read" in str(error)


def test_config_that_is_no_text_is_refused(run: Run, config: Path) -> None:
    config.write_bytes(b"\xff\xfe\x00")
    assert "not UTF-8" in str(refusal(run(recommend, "--config", str(config), *LIMITS)))


def test_text_of_a_config_in_place_of_its_path_is_refused(run: Run) -> None:
    error = refusal(run(recommend, "--config", json.dumps(CONFIG) * 9, *LIMITS))
    assert len(error.violations) == 1


def test_unknown_name_is_refused_with_those_that_are_known(run: Run) -> None:
    error = refusal(run(recommend, "--config", "nobody/knows", *LIMITS))
    assert "neither bundled nor measured" in str(error)
    assert "llama-13b" in str(error)


def test_name_without_a_file_is_refused(run: Run) -> None:
    assert "--name" in str(refusal(run(recommend, *LLAMA, "--name", "x")))


def test_all_candidates_and_some_is_refused(run: Run) -> None:
    assert "goes alone" in str(refusal(run(recommend, *LLAMA, "--candidate", "all", "--candidate", "1xT4-16GB")))


def test_number_of_users_no_message_holds_is_refused(run: Run) -> None:
    arguments = ("--users", str(10**30), "--nttft-ms", "1", "--itl-ms", "1")
    assert "--users" in str(refusal(run(recommend, "--config", "llama-7b", *arguments)))


def test_every_violation_of_the_service_arrives(run: Run) -> None:
    arguments = ("--users", "0", "--nttft-ms", "nan", "--itl-ms", "-1", "--candidate", "1xT5-16GB")
    error = refusal(run(recommend, "--config", "llama-7b", *arguments))
    fields = {violation.field for violation in error.violations}
    assert fields == {"users_count", "limits.nttft_ms", "limits.itl_ms", "gpu_profiles.names[0]"}


def test_dead_recommender_is_said_so() -> None:
    result = CliRunner().invoke(recommend, LLAMA, obj=RunningPlatform("127.0.0.1:1"))
    assert isinstance(result.exception, UnavailableError)
    assert "127.0.0.1:1" in str(result.exception)


@pytest.mark.parametrize("arguments", [(), ("--config", "x"), (*LLAMA, "--users", "many")])
def test_missing_and_mistyped_options_are_usage_errors(run: Run, arguments: tuple[str, ...]) -> None:
    assert run(recommend, *arguments).exit_code == 2


@pytest.fixture
def two_llms(small_dataset: Dataset, tmp_path: Path) -> Path:
    """A dataset file of two LLMs."""
    path = tmp_path / "dataset.csv"
    write_dataset(path, (row for row in small_dataset.measurements if row.llm.startswith("llama")), {})
    return path


def test_trained_model_can_be_served(two_llms: Path, tmp_path: Path) -> None:
    out = tmp_path / "model"
    arguments = ("--dataset", str(two_llms), "--itl-ms", "40", "--seed", "5", "--out", str(out))
    result = CliRunner().invoke(train, arguments)
    assert result.exception is None
    manifest, predictor = load_predictor(out)
    assert manifest.name in result.output
    assert manifest.training_llms == ("llama-13b", "llama-7b")
    assert (manifest.limits.nttft_ms, manifest.limits.itl_ms, manifest.seed) == (100, 40, 5)
    assert predictor.users_counts == (1, 8, 32, 128)
    again = CliRunner().invoke(train, (*arguments[:-1], str(tmp_path / "again")))
    assert manifest.name in again.output  # the id comes from the booster's bytes


def test_training_on_one_llm_is_refused(small_dataset: Dataset, tmp_path: Path) -> None:
    path = tmp_path / "dataset.csv"
    write_dataset(path, (row for row in small_dataset.measurements if row.llm == "llama-7b"), {})
    result = CliRunner().invoke(train, ("--dataset", str(path), "--out", str(tmp_path / "model")))
    assert isinstance(result.exception, PreconditionError)
    assert not (tmp_path / "model").exists()


def test_all_wrong_limits_of_a_training_are_named(tmp_path: Path) -> None:
    arguments = ("--nttft-ms", "0", "--itl-ms", "nan", "--out", str(tmp_path / "model"))
    assert len(refusal(CliRunner().invoke(train, arguments)).violations) == 2


@pytest.mark.parametrize("arguments", [("--seeds", "0"), ("--seeds", "many"), ("--depth", "3")])
def test_wrong_options_of_an_evaluation_are_usage_errors(arguments: tuple[str, ...]) -> None:
    assert CliRunner().invoke(evaluate, arguments).exit_code == 2


def test_help_of_an_evaluation_names_its_options() -> None:
    result = CliRunner().invoke(evaluate, ["--help"])
    assert result.exit_code == 0
    for option in ("--seeds", "--published", "--out", "--prices", "--gpus", "--dataset"):
        assert option in result.output


def test_evaluation_refuses_files_before_it_starts(tmp_path: Path) -> None:
    report = tmp_path / "report.json"
    report.write_text("{}")
    for arguments in (
        ("--dataset", str(tmp_path / "prices.csv"), "--prices", str(tmp_path / "none.csv")),
        ("--dataset", str(BUNDLED_DATASET), "--out", str(report)),
        ("--published", str(tmp_path)),
        ("--prices", str(tmp_path / "none.csv")),
    ):
        result = CliRunner().invoke(evaluate, arguments)
        assert result.exception is not None
        assert str(tmp_path) in str(result.exception)


def test_evaluation_of_two_llms_is_refused(two_llms: Path) -> None:
    result = CliRunner().invoke(evaluate, ("--dataset", str(two_llms)))
    assert isinstance(result.exception, PreconditionError)
    assert "three LLMs" in str(result.exception)


def test_report_that_cannot_be_written_is_refused_before_the_evaluation(tmp_path: Path) -> None:
    for out in (tmp_path, tmp_path / "none" / "report.json"):
        result = CliRunner().invoke(evaluate, ("--out", str(out)))
        assert isinstance(result.exception, PreconditionError)
        assert str(out) in str(result.exception)


def test_model_that_cannot_be_written_is_refused_before_the_training(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    result = CliRunner().invoke(train, ("--out", str(tmp_path / "file")))
    assert isinstance(result.exception, PreconditionError)
    assert "file cannot be made a folder" in str(result.exception)
    assert "trainings" not in result.output


def test_evaluation_with_other_prices_does_not_resume(small_dataset: Dataset, tmp_path: Path) -> None:
    dataset, out, prices = tmp_path / "dataset.csv", tmp_path / "report.json", tmp_path / "prices.csv"
    write_dataset(dataset, small_dataset.measurements, {})
    arguments = ("--dataset", str(dataset), "--seeds", "1", "--out", str(out))
    assert CliRunner().invoke(evaluate, arguments).exception is None
    prices.write_text("gpu_profile,price_per_hour\n1xA100-40GB,99\n")
    result = CliRunner().invoke(evaluate, (*arguments, "--prices", str(prices)))
    assert isinstance(result.exception, PreconditionError)
    assert "name another --out" in str(result.exception)


def test_evaluation_of_a_small_dataset_prints_and_keeps_its_scores(small_dataset: Dataset, tmp_path: Path) -> None:
    dataset, out = tmp_path / "dataset.csv", tmp_path / "report.json"
    write_dataset(dataset, small_dataset.measurements, {})
    for seeds in ("1", "2"):
        result = CliRunner().invoke(evaluate, ("--dataset", str(dataset), "--seeds", seeds, "--out", str(out)))
        assert result.exception is None
        assert [entry["seed"] for entry in json.loads(out.read_text())["results"]] == [*range(int(seeds))]
    assert "seed 1 of 2" in result.output
    assert "seed 0 of 2" not in result.output  # it was done
    assert "oracle" in result.output
