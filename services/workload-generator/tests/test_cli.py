"""`llm-pilot workload` as somebody types it."""

import gc
import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pyarrow.csv as pa_csv
import pyarrow.parquet as pq
import pytest
from click.testing import CliRunner

from llmpilot_contracts.errors import InvalidInputError, NotFoundError, PilotError
from llmpilot_workload_generator.cli_workload import workload
from llmpilot_workload_generator.profiles import load_profile
from llmpilot_workload_generator.sample_output import write_samples
from llmpilot_workload_generator.sampling.sampler import Sample, SampleOptions, Sampler

ROWS = 300
SAMPLE_TO_STDOUT = """
from llmpilot_contracts.errors import PilotError
from llmpilot_workload_generator.cli_workload import workload
try:
    workload(["sample", "code", "-n", "100000"], standalone_mode=False)
except PilotError as error:
    raise SystemExit(f"{type(error).__name__}: {error}")
"""


class InterruptedSampler(Sampler):
    """One whose user presses Ctrl-C after the first batch."""

    def __init__(self) -> None:
        super().__init__(load_profile("code"), SampleOptions())

    def draw(self, start: int, count: int) -> Sample:
        """Give the first batch only."""
        if start:
            raise KeyboardInterrupt
        return super().draw(start, count)


@pytest.fixture(autouse=True)
def in_a_folder_of_its_own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    lines = ["timestamp,input_tokens,output_tokens"]
    lines += [f"{index / 10},{100 + index % 7},{1 + index % 3}" for index in range(ROWS)]
    Path("trace.csv").write_text("\n".join(lines) + "\n")


def output_of(*arguments: str) -> str:
    result = CliRunner().invoke(workload, arguments, catch_exceptions=False)
    assert result.exit_code == 0, result.output
    return result.stdout


def refusal_of(*arguments: str, kind: type[PilotError] = InvalidInputError) -> str:
    result = CliRunner().invoke(workload, arguments)
    assert isinstance(result.exception, kind), result.output
    return str(result.exception)


def test_fit_names_its_model_after_the_trace() -> None:
    shown = output_of("fit", "trace.csv")
    assert "300 requests, 21 cells" in shown
    assert Path("trace.workload").is_file()
    assert "fit trace.csv" in output_of("describe", "trace.workload")


def test_a_model_tells_the_command_as_a_shell_takes_it() -> None:
    output_of("fit", "trace.csv", "--source", "ours; all", "--licence", "none")
    made_by = json.loads(output_of("describe", "trace.workload", "--json"))["command"]
    assert made_by.endswith("fit trace.csv --source 'ours; all' --licence none")


def test_a_fitted_model_gives_back_what_it_was_fitted_to() -> None:
    """7 x 3 combinations, 300 rows: means by hand."""
    output_of("fit", "trace.csv", "--out", "m.workload")
    output_of("sample", "m.workload", "-n", "20000", "--out", "drawn.csv")
    drawn = pa_csv.read_csv("drawn.csv")
    assert drawn.num_rows == 20000
    assert set(drawn.column_names) >= {"input_tokens", "output_tokens"}
    # standard errors of the means: 2/sqrt(20000) = .014 and .8/sqrt(20000) = .006
    assert np.mean(drawn["input_tokens"].to_numpy()) == pytest.approx(
        np.mean([100 + index % 7 for index in range(ROWS)]), abs=0.07
    )
    assert np.mean(drawn["output_tokens"].to_numpy()) == pytest.approx(2, abs=0.03)


def test_parts_of_a_trace_fitted_over_common_edges_merge_to_the_fit_of_all() -> None:
    lines = Path("trace.csv").read_text().splitlines()
    Path("a.csv").write_text("\n".join([lines[0], *lines[1:101]]) + "\n")
    Path("b.csv").write_text("\n".join([lines[0], *lines[101:]]) + "\n")
    for name in "ab":
        output_of("fit", f"{name}.csv")
    output_of("edges", "a.workload", "b.workload", "--out", "edges.json")
    for name in ("a", "b", "trace"):
        output_of("fit", f"{name}.csv", "--edges", "edges.json")
    output_of("merge", "a.workload", "b.workload", "--out", "merged.workload")
    merged, whole = (json.loads(output_of("describe", f"{name}.workload", "--json")) for name in ("merged", "trace"))
    assert merged["request_count"] == whole["request_count"] == ROWS
    assert merged["marginals"] == whole["marginals"]


def test_drawn_requests_go_on_where_a_stream_stopped() -> None:
    output_of("sample", "production", "-n", "100", "--out", "all.parquet")
    output_of("sample", "production", "-n", "40", "--start", "60", "--out", "rest.parquet")
    assert pq.read_table("all.parquet").slice(60).equals(pq.read_table("rest.parquet"))


def test_a_condition_holds_for_every_request() -> None:
    output_of(
        "sample",
        "production",
        "-n",
        "1000",
        "--out",
        "s.parquet",
        "--where",
        "input_tokens <= 874",
        "--where",
        "batch_size=1",
    )
    drawn = pq.read_table("s.parquet")
    assert max(drawn["input_tokens"].to_pylist()) <= 874
    assert set(drawn["batch_size"].to_pylist()) == {1}


def test_a_kept_trace_is_replayed_at_its_times() -> None:
    output_of("fit", "trace.csv", "--keep-replay", "--arrivals", "trace")
    rows = [json.loads(line) for line in _lines("sample", "trace.workload", "--replay", "--out", "r.jsonl")]
    assert len(rows) == ROWS
    assert [row["input_tokens"] for row in rows[:8]] == [100, 101, 102, 103, 104, 105, 106, 100]
    assert rows[10]["arrival_nanos"] == 1_000_000_000


def test_prompts_come_with_bodies_for_a_server() -> None:
    rows = [
        json.loads(line)
        for line in _lines(
            "sample",
            "conversation",
            "-n",
            "3",
            "--server",
            "openai-completions",
            "--served-model",
            "m",
            "--out",
            "p.jsonl",
        )
    ]
    assert [row["index"] for row in rows] == [0, 1, 2]
    for row in rows:
        (body,) = row["bodies"]
        assert body["model"] == "m"
        assert body["max_tokens"] == row["output_tokens"]
        assert row["prompts"] == [body["prompt"]]


def _lines(*arguments: str) -> list[str]:
    output_of(*arguments)
    return Path(arguments[arguments.index("--out") + 1]).read_text().splitlines()


def test_plot_draws_curves_and_the_heat_map_twice_each() -> None:
    output_of("fit", "trace.csv")
    drawn = output_of("plot", "trace.workload").split()
    assert {Path(name).suffix for name in drawn} == {".png", ".svg"}
    assert all(Path(name).stat().st_size > 1000 for name in drawn)


def test_compare_says_that_a_model_is_like_itself_and_unlike_another() -> None:
    same = json.loads(output_of("compare", "code", "code", "--json"))
    other = json.loads(output_of("compare", "code", "conversation", "--json"))
    assert all(entry["distance"] == 0 for entry in same["distances"])
    assert any(entry["distance"] > 0.2 for entry in other["distances"])


def test_every_profile_is_listed_with_its_source() -> None:
    shown = output_of("profiles")
    for name in ("production", "code", "conversation", "summarization", "question-answering", "text-generation"):
        assert name in shown


def test_an_unknown_model_is_refused_with_the_profiles_there_are() -> None:
    assert "production" in refusal_of("describe", "nothing", kind=NotFoundError)


def test_all_wrong_options_of_sample_are_listed_at_once() -> None:
    message = refusal_of(
        "sample", "code", "-n", "0", "--start", "-1", "--out", "x.txt", "--scale", "input_tokens=a", "--rate", "3"
    )
    for words in ("--count", "--start", "--out", "--scale", "--rate"):
        assert words in message


def test_an_output_that_cannot_be_written_is_refused_before_the_work() -> None:
    assert "--out" in refusal_of("fit", "trace.csv", "--out", "no/such/folder/m.workload")
    assert "--out" in refusal_of("sample", "code", "--out", "no/such/folder/m.csv")


def test_replaying_the_arrivals_of_a_trace_needs_the_trace() -> None:
    assert "--keep-replay" in refusal_of("fit", "trace.csv", "--arrivals", "trace")


def test_fit_import_and_edges_do_not_overwrite_what_they_read() -> None:
    Path("link.csv").symlink_to("trace.csv")
    content = Path("trace.csv").read_bytes()
    for name in ("trace.csv", "link.csv"):
        assert "--out: must be another file" in refusal_of("fit", "trace.csv", "--out", name)
        assert "--out: must be another file" in refusal_of("import", "trace.csv", "--out", name)
    assert Path("trace.csv").read_bytes() == content
    output_of("fit", "trace.csv")
    assert "--out: must be another file" in refusal_of("edges", "trace.workload", "--out", "trace.workload")
    refusal_of("fit", "trace.csv", "--edges", "trace.workload")
    assert "300 in" in output_of("describe", "trace.workload")


def test_a_profile_does_wherever_a_model_file_does() -> None:
    output_of("edges", "code", "conversation", "--out", "edges.json")
    assert "8,819 requests" in output_of("merge", "code", "--out", "m.workload")
    Path("t.csv").write_text("input_tokens,output_tokens\n5,6\n")
    output_of("fit", "t.csv", "--edges", "code")
    assert "8,820 requests" in output_of("merge", "t.workload", "code", "--out", "m.workload")


def test_all_wrong_options_of_fit_are_listed_at_once() -> None:
    message = refusal_of(
        "fit", "trace.csv", "--bins", "1", "--edges", "code", "--out", "no/m", "--column", "a", "--rate", "3"
    )
    for words in ("--bins: must be 2 to 256, is 1", "--bins: cannot go with --edges", "--out", "--column", "--rate"):
        assert words in message
    assert "--bins" in refusal_of("edges", "code", "--bins", "300", "--out", "e.json")


def test_an_unknown_format_is_refused_with_those_there_are() -> None:
    result = CliRunner().invoke(workload, ["fit", "trace.csv", "--format", "azure"])
    assert result.exit_code != 0
    assert "azure-2023" in result.output


def test_options_that_would_do_nothing_are_refused_all_at_once() -> None:
    options = ("--tokenizer", "t", "--corpus", "c", "--shared-prefix-ratio", ".5", "--served-model", "m")
    message = refusal_of("sample", "code", *options)
    for name in options[::2]:
        assert f"{name}: goes with" in message
    assert "--prefix-groups: goes with" in refusal_of("sample", "code", "--prompts", "--prefix-groups", "3")
    assert "--served-model: goes with" in refusal_of("sample", "code", "--server", "tgi", "--served-model", "m")


def test_a_factor_that_is_given_twice_is_refused() -> None:
    assert "input_tokens once" in refusal_of("sample", "code", "--scale", "input_tokens=2", "--scale", "input_tokens=3")


def test_what_is_wrong_with_requests_and_with_prompts_is_said_at_once() -> None:
    message = refusal_of("sample", "code", "--context-length", "1", "--server", "openai-chat")
    assert "--context-length" in message
    assert "--served-model" in message


def test_the_end_of_a_replay_is_said() -> None:
    output_of("fit", "trace.csv", "--keep-replay")
    result = CliRunner().invoke(workload, ("sample", "trace.workload", "--replay", "-n", "400", "--start", "100"))
    assert len(result.stdout.splitlines()) == 1 + 200
    assert "200 of 400" in result.stderr
    assert f"must be < {ROWS}" in refusal_of("sample", "trace.workload", "--replay", "--start", str(ROWS))


def test_a_full_disk_behind_the_terminal_is_one_error() -> None:
    if not Path("/dev/full").exists():
        pytest.skip("no /dev/full here")
    command = [sys.executable, "-c", SAMPLE_TO_STDOUT]
    with Path("/dev/full").open("wb") as full:
        done = subprocess.run(command, stdout=full, stderr=subprocess.PIPE, text=True, timeout=60, check=False)
    assert (
        done.stderr.strip().splitlines()[-1]
        == "PreconditionError: the output cannot be written: No space left on device"
    )


def test_an_interrupted_parquet_file_leaves_nothing_and_says_nothing_else() -> None:
    with pytest.raises(KeyboardInterrupt):
        write_samples(InterruptedSampler(), start=0, count=200_000, out=Path("x.parquet"), renderer=None)
    gc.collect()  # a writer that is not closed would fail here, and warnings are errors
    assert list(Path().glob("*x.parquet*")) == []


def test_only_the_asked_parameters_are_written() -> None:
    """As `simulate run --requests` wants them."""
    output_of("sample", "production", "-n", "5", "--parameters", "output_tokens,input_tokens", "--out", "s.csv")
    assert Path("s.csv").read_text().splitlines()[0] == "output_tokens,input_tokens"
    assert "'users'" in refusal_of("sample", "production", "--parameters", "users")


def test_what_the_sampler_refuses_is_told_by_the_options_names() -> None:
    message = refusal_of("sample", "code", "--where", "size < 3", "--context-length", "1", "--scale", "input_tokens=0")
    for option in ("--where", "--context-length", "--scale"):
        assert option in message


def test_a_model_is_not_written_among_the_parts_of_the_trace() -> None:
    Path("parts").mkdir()
    Path("parts/a.csv").write_text(Path("trace.csv").read_text())
    for name in ("parts/a.csv", "parts/m.workload"):
        assert "must be outside of parts" in refusal_of("fit", "parts", "--out", name)
    assert Path("parts/a.csv").read_text() == Path("trace.csv").read_text()


def test_a_parameter_named_twice_is_refused() -> None:
    twice = ("--column", "input_tokens=input_tokens", "--column", "input_tokens=output_tokens")
    assert "must name input_tokens once" in refusal_of("fit", "trace.csv", *twice)
