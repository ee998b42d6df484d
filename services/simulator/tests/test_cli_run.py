"""`llm-pilot simulate run` as somebody types it."""

import json
import re
from pathlib import Path
from typing import cast

import pyarrow.parquet as pq
import pytest
from click.testing import CliRunner

from llmpilot_contracts.errors import InvalidInputError
from llmpilot_contracts.record_schema import COLUMN_NAMES, problems
from llmpilot_simulator.cli_simulate import simulate

LLAMA = ("run", "--llm", "llama-2-13b", "--gpu", "1xA100-40GB")


def output_of(*arguments: str) -> str:
    result = CliRunner().invoke(simulate, arguments, catch_exceptions=False)
    assert result.exit_code == 0, result.output
    return result.stdout


def levels_of(*arguments: str) -> list[dict[str, float]]:
    (ladder,) = json.loads(output_of(*arguments, "--json"))
    assert ladder["origin"] == "simulated"
    return cast("list[dict[str, float]]", ladder["levels"])


def test_the_ladder_of_users_is_printed_and_drawn() -> None:
    shown = output_of(*LLAMA)
    for words in ("simulated", "TTFT ms", "ITL ms", "tokens/s", "median TTFT, ms", "1000 tokens per dollar"):
        assert words in shown
    assert not re.search(r"\de\d", shown), "numbers that people read have no exponent"
    assert [level["users_count"] for level in levels_of(*LLAMA)] == [1, 2, 4, 8, 16, 32, 64, 128]


def test_more_users_get_more_tokens_later() -> None:
    levels = levels_of(*LLAMA, "--users", "1,8,32")
    for metric in ("ttft_ms_median", "itl_ms_median", "tokens_per_second"):
        values = [level[metric] for level in levels]
        assert values == sorted(values)


def test_one_user_waits_for_the_prefill_and_the_decode_steps_alone() -> None:
    """One user, 200 tokens in and 3 out: every request takes one prefill and two decodes, nothing else."""
    (level,) = levels_of(*LLAMA, "--users", "1", "--input-tokens", "200", "--output-tokens", "3")
    seconds = (level["ttft_ms_median"] + 2 * level["itl_ms_median"]) / 1e3
    assert level["requests_per_second"] == pytest.approx(1 / seconds, rel=0.01)
    assert level["tokens_per_second"] == pytest.approx(3 / seconds, rel=0.01)


def test_the_same_seed_gives_the_same_ladder_and_another_one_another() -> None:
    assert levels_of(*LLAMA, "--users", "4") == levels_of(*LLAMA, "--users", "4")
    assert levels_of(*LLAMA, "--users", "4") != levels_of(*LLAMA, "--users", "4", "--seed", "1")


def test_an_unsafe_batch_weight_fails_requests() -> None:
    (level,) = levels_of(*LLAMA, "--users", "128", "--max-batch-weight", "15000")
    assert level["error_rate"] > 0


def test_explain_says_where_the_memory_goes() -> None:
    assert "26.03 GB weights: 13.02 billion parameters" in output_of(*LLAMA, "--users", "1", "--explain")


@pytest.mark.parametrize(("name", "beginning"), [("a.png", b"\x89PNG"), ("a.svg", b"<?xml")])
def test_the_curves_are_drawn_into_a_file(tmp_path: Path, name: str, beginning: bytes) -> None:
    output_of(*LLAMA, "--gpu", "2xA100-40GB", "--users", "1,2", "--plot", str(tmp_path / name))
    assert (tmp_path / name).read_bytes().startswith(beginning)


def test_the_records_are_written_in_the_schema_of_load_tests(tmp_path: Path) -> None:
    path = tmp_path / "records.parquet"
    output_of(*LLAMA, "--users", "1,2", "--duration", "10", "--records", str(path))
    table = pq.read_table(path)
    assert table.column_names == ["llm", "gpu_profile", "users_count", *COLUMN_NAMES]
    assert set(table["users_count"].to_pylist()) == {1, 2}
    assert list(problems({name: table[name].to_pylist() for name in COLUMN_NAMES})) == []


def test_requests_are_read_from_a_file(tmp_path: Path) -> None:
    path = tmp_path / "requests.csv"
    path.write_text("input_tokens,output_tokens,count\n200,3,5\n", "utf-8")
    fixed = levels_of(*LLAMA, "--users", "1", "--input-tokens", "200", "--output-tokens", "3")
    assert levels_of(*LLAMA, "--users", "1", "--requests", str(path)) == fixed


def test_every_wrong_option_is_told_at_once(tmp_path: Path) -> None:
    arguments = (*LLAMA, "--users", "0,x", "--duration", "-1", "--seed", "-1", "--plot", "a.gif", "--input-tokens", "0")
    with pytest.raises(InvalidInputError) as caught:
        output_of(*arguments)
    assert [violation.field for violation in caught.value.violations] == [
        *("--duration", "--seed", "--plot", "--users", "--users", "--input-tokens", "--output-tokens")
    ]
    nowhere = str(tmp_path / "none" / "a.svg")
    with pytest.raises(InvalidInputError) as caught:
        output_of(*LLAMA, "--plot", nowhere, "--records", str(tmp_path), "--input-tokens", "9" * 20)
    assert [violation.field for violation in caught.value.violations] == [
        *("--plot", "--records", "--input-tokens", "--output-tokens")
    ]
    empty = tmp_path / "empty.csv"
    empty.write_text("input_tokens,output_tokens\n0,1\n", "utf-8")
    with pytest.raises(InvalidInputError, match="input_tokens: must be > 0"):
        output_of(*LLAMA, "--requests", str(empty))


def test_a_request_longer_than_the_batch_is_refused_with_its_length() -> None:
    with pytest.raises(InvalidInputError, match="9000 tokens"):
        output_of(*LLAMA, "--users", "1", "--input-tokens", "8000", "--output-tokens", "1000")
