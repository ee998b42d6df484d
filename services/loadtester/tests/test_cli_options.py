from pathlib import Path

import click
import pytest
from click.testing import CliRunner

from llmpilot_contracts.errors import InvalidInputError
from llmpilot_loadtester.cli_options import RunOptions, run_options
from llmpilot_loadtester.cli_spec import llm_config_of, spec_of
from llmpilot_loadtester.domain.spec import (
    LoadKind,
    LoadTestSpec,
    PromptRequests,
    Protocol,
    SyntheticRequests,
    UserStep,
    WorkloadRequests,
)

TARGET = ["--target", "http://localhost:8000"]


def options_of(*arguments: str) -> RunOptions:
    """The options of a command line."""
    found: list[RunOptions] = []

    @click.command()
    @run_options
    def command(**options: object) -> None:
        found.append(RunOptions(**options))  # type: ignore[arg-type]

    result = CliRunner().invoke(command, [*TARGET, *arguments], standalone_mode=False)
    if result.exception:
        raise result.exception
    return found[0]


def spec(*arguments: str) -> LoadTestSpec:
    """What a command line means; raises what it refuses."""
    return spec_of(options_of(*arguments))


def refusals(*arguments: str) -> list[str]:
    with pytest.raises(InvalidInputError) as caught:
        spec(*arguments)
    return [str(violation) for violation in caught.value.violations]


def test_the_default_is_the_ladder_of_the_paper() -> None:
    """III-C.3: 1, 2, 4 ... 128 concurrent users, two minutes each."""
    made = spec()
    assert [stage.load.most_users for stage in made.stages] == [1, 2, 4, 8, 16, 32, 64, 128]
    assert {stage.measure_seconds for stage in made.stages} == {120.0}
    assert isinstance(made.requests, WorkloadRequests)
    assert made.requests.workload_model == "production"


def test_users_make_a_stage_each() -> None:
    made = spec("--users", "1,2,4,8", "--duration", "20s", "--profile", "conversation")
    assert [stage.load.label for stage in made.stages] == ["1 user", "2 users", "4 users", "8 users"]
    assert {(stage.warm_up_seconds, stage.measure_seconds) for stage in made.stages} == {(5.0, 20.0)}


def test_steps_make_one_stage() -> None:
    (stage,) = spec("--users", "0s:1/30s:8/1m:16", "--ramp", "--duration", "2m").stages
    assert stage.load.user_steps == (
        UserStep(at_seconds=0.0, users_count=1),
        UserStep(at_seconds=30.0, users_count=8),
        UserStep(at_seconds=60.0, users_count=16),
    )
    assert stage.load.ramp


def test_rates_are_poisson_unless_told_otherwise() -> None:
    assert [stage.load.kind for stage in spec("--rate", "10,20.5").stages] == [LoadKind.POISSON] * 2
    (gamma,) = spec("--rate", "10", "--arrivals", "gamma", "--burstiness", "0.25").stages
    assert (gamma.load.kind, gamma.load.burstiness) == (LoadKind.GAMMA, 0.25)


def test_a_trace_is_replayed_in_its_order() -> None:
    made = spec("--profile", "mine", "--arrivals", "trace", "--speed", "2")
    assert (made.stages[0].load.kind, made.stages[0].load.speed) == (LoadKind.TRACE, 2.0)
    assert isinstance(made.requests, WorkloadRequests)
    assert made.requests.replay


def test_a_search_has_no_stages() -> None:
    made = spec("--search", "users", "--ttft-ms", "500", "--high", "64")
    assert made.stages == ()
    assert made.search is not None
    assert (made.search.kind, made.search.low, made.search.high) == (LoadKind.USERS, 1.0, 64.0)


@pytest.mark.parametrize(
    ("url", "protocol"),
    [
        ("http://h:1", Protocol.OPENAI_COMPLETIONS),
        ("http://h:1/v1/chat/completions", Protocol.OPENAI_CHAT),
        ("http://h:1/generate_stream", Protocol.TGI),
        ("grpc://h:1", Protocol.TGIS),
    ],
)
def test_the_protocol_is_seen_in_the_url(url: str, protocol: Protocol) -> None:
    assert spec("--target", url).target.protocol is protocol


def test_an_address_without_a_scheme_is_http() -> None:
    assert spec("--target", "localhost:8000").target.url == "http://localhost:8000"


def test_prompts_come_from_a_file(tmp_path: Path) -> None:
    path = tmp_path / "prompts.jsonl"
    path.write_text('{"prompt": "a"}\n')
    made = spec("--prompts", str(path), "--output-tokens", "7")
    assert made.requests == PromptRequests(jsonl=b'{"prompt": "a"}\n', output_tokens=7)


def test_prompts_are_made_up() -> None:
    made = spec("--input-tokens", "100", "--output-tokens", "20", "--seed", "3")
    assert made.requests == SyntheticRequests(input_tokens=100, output_tokens=20, seed=3)


def test_the_key_comes_from_the_environment_and_is_not_shown(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LLMPILOT_API_KEY", "a-key")
    made = spec("--header", "X-Team=blue")
    assert (made.target.api_key, made.target.headers) == ("a-key", (("X-Team", "blue"),))
    assert "a-key" not in repr(made)
    assert "blue" not in repr(made)


def test_the_config_of_an_llm_is_a_file(tmp_path: Path) -> None:
    path = tmp_path / "config.json"
    path.write_text("{}")
    options = options_of("--llm", "mine", "--llm-config", str(path))
    assert (spec_of(options).llm_name, llm_config_of(options)) == ("mine", "{}")
    with pytest.raises(InvalidInputError, match="--llm-config: /no/such cannot be read"):
        llm_config_of(options_of("--llm", "mine", "--llm-config", "/no/such"))


def test_everything_that_is_wrong_is_told_at_once() -> None:
    told = refusals(
        "--users", "1,x", "--rate", "5", "--low", "2", "--speed", "3", "--header", "nothing", "--scale", "a=b"
    )
    assert len(told) == len({text.partition(":")[0] for text in told}) == 6


@pytest.mark.parametrize(
    ("arguments", "told"),
    [
        (["--users", "0"], "--users: must be >= 1, is 0"),
        (["--rate", "-1"], "--rate: must be > 0, is -1"),
        (["--rate", "nan"], "--rate: must be > 0, is nan"),
        (["--arrivals", "poisson"], "--arrivals: poisson needs --rate"),
        (["--search", "users"], "--search: needs a limit, e.g. --ttft-ms 500"),
        (
            ["--search", "users", "--itl-ms", "9", "--users", "3"],
            "--users: goes without --search, which chooses the load",
        ),
        (["--input-tokens", "5"], "--output-tokens: is needed by --input-tokens"),
        (["--profile", "code", "--output-tokens", "5"], "--output-tokens: goes with --prompts or --input-tokens"),
        (
            ["--input-tokens", "5", "--output-tokens", "5", "--replay"],
            "--replay: goes with --profile, not with --input-tokens",
        ),
        (["--prompts", "/no/such"], "--prompts: /no/such cannot be read: No such file or directory"),
        (["--duration", "0"], "--duration: must be > 0, is 0 s"),
        (["--llm-config", "x"], "--llm-config: goes with --llm, the name that measurements are published under"),
        (
            ["--at-once", "5", "--warm-up", "1s"],
            "--warm-up: goes without --at-once, which sends so many requests when the stage starts",
        ),
    ],
)
def test_it_is_told_what_is_wrong(arguments: list[str], told: str) -> None:
    assert told in refusals(*arguments)


def test_a_time_that_is_none_is_refused() -> None:
    with pytest.raises(click.BadParameter, match="write 20s, 500ms, 2m or 1h"):
        spec("--duration", "soon")
