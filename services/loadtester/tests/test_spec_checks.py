from dataclasses import replace
from typing import Any

import pytest

from llmpilot_contracts.errors import Violation
from llmpilot_loadtester.domain.spec import (
    DEFAULT_LADDER,
    Load,
    LoadKind,
    LoadSearch,
    LoadTestSpec,
    PromptRequests,
    Protocol,
    ServiceLevel,
    Stage,
    SyntheticRequests,
    Target,
    UserStep,
    WorkloadRequests,
)
from llmpilot_loadtester.domain.spec_checks import spec_violations

INFINITE, NOT_A_NUMBER = float("inf"), float("nan")
TARGET = Target(url="http://server:8000/prefix")
SYNTHETIC = SyntheticRequests(input_tokens=10, output_tokens=10)
SPEC = LoadTestSpec(target=TARGET, requests=SYNTHETIC)
WORKLOAD = WorkloadRequests(workload_model="conversation")
LEVEL = ServiceLevel(ttft_ms=500)
SEARCH = LoadSearch(kind=LoadKind.USERS, low=1, high=64)


def pairs(spec: LoadTestSpec) -> list[tuple[str, str]]:
    return [(violation.field, violation.description) for violation in spec_violations(spec)]


def only(spec: LoadTestSpec) -> tuple[str, str]:
    found = pairs(spec)
    assert len(found) == 1, found
    return found[0]


def users(*steps: tuple[float, int]) -> Load:
    user_steps = tuple(UserStep(at_seconds=at, users_count=count) for at, count in steps)
    return Load(kind=LoadKind.USERS, user_steps=user_steps)


def staged(load: Load, *, warm_up_seconds: float = 0.0, measure_seconds: float = 60.0) -> LoadTestSpec:
    stage = Stage(load=load, warm_up_seconds=warm_up_seconds, measure_seconds=measure_seconds)
    return replace(SPEC, stages=(DEFAULT_LADDER[0], stage))


@pytest.mark.parametrize(
    "spec",
    [
        SPEC,
        replace(SPEC, stages=DEFAULT_LADDER, requests=WORKLOAD),
        replace(SPEC, search=SEARCH, service_level=LEVEL),
        replace(SPEC, search=LoadSearch(kind=LoadKind.POISSON, low=0.1, high=0.1), service_level=LEVEL),
        replace(SPEC, target=replace(TARGET, url="https://[::1]:8000", headers=(("X-Team", "blue team\tétude"),))),
        replace(SPEC, target=Target(url="grpcs://server", protocol=Protocol.TGIS)),
        replace(SPEC, requests=PromptRequests(jsonl=b'{"prompt": "a", "output_tokens": 3}\r\n\n{"body": {"x": 1}}')),
        replace(SPEC, reply_tokenizer_json=b'{"model": {}}', worker_count=256, seed=2**64 - 1),
        staged(users((0, 1), (0.05, 3)), measure_seconds=0.1),
        staged(Load(kind=LoadKind.GAMMA, rate_per_second=0.1, burstiness=0.1)),
        staged(Load(kind=LoadKind.ALL_AT_ONCE, request_count=1)),
        replace(staged(Load(kind=LoadKind.TRACE, speed=2.0)), requests=WORKLOAD),
    ],
)
def test_spec_that_can_be_run_has_no_violations(spec: LoadTestSpec) -> None:
    assert spec_violations(spec) == []


@pytest.mark.parametrize(
    ("url", "protocol", "problem"),
    [
        ("", Protocol.TGI, 'must be like "http://host:port" or "https://host:port", is empty'),
        ("server:8000", Protocol.TGI, "for tgi, is 'server:8000'"),
        ("ftp://server", Protocol.OPENAI_CHAT, "for openai-chat, is 'ftp://server'"),
        ("grpc://server", Protocol.OPENAI_COMPLETIONS, "for openai-completions, is 'grpc://server'"),
        ("http://server", Protocol.TGIS, 'must be like "grpc://host:port" or "grpcs://host:port" for tgis'),
        ("http://", Protocol.TGI, "has no host"),
        ("http://server:0", Protocol.TGI, "has no port"),
        ("http://server:99999", Protocol.TGI, "Port out of range 0-65535"),
        ("http://server:x", Protocol.TGI, "Port could not be cast"),
        ("http://[::1", Protocol.TGI, "Invalid IPv6 URL"),
        ("http://server/a\r\nX: y", Protocol.TGI, "has a space or a line break"),
        ("http://me:secret@server", Protocol.TGI, "must have no user or password"),
        ("http://server/?a=b", Protocol.TGI, "must have neither a query nor a fragment"),
    ],
)
def test_url_must_fit_its_protocol(url: str, protocol: Protocol, problem: str) -> None:
    field, description = only(replace(SPEC, target=Target(url=url, protocol=protocol)))
    assert field == "spec.target.url"
    assert problem in description


def test_password_in_a_url_is_not_repeated() -> None:
    _, description = only(replace(SPEC, target=Target(url="ftp://me:secret@server/x")))
    assert "secret" not in description
    assert "'ftp://...@server/x'" in description


@pytest.mark.parametrize(
    ("change", "field", "problem"),
    [
        ({"api_key": "a\nb"}, "api_key", "must be ASCII without spaces and line breaks"),
        ({"api_key": "schlüssel"}, "api_key", "must be ASCII without spaces and line breaks"),
        ({"headers": (("X-A", "1"), ("X B", "1"))}, "headers[1].name", "must be a header's name, is 'X B'"),
        ({"headers": (("", "1"),)}, "headers[0].name", "must be a header's name, is ''"),
        ({"headers": (("X-A\r\nY", "1"),)}, "headers[0].name", "must be a header's name, is 'X-A\\r\\nY'"),
        ({"headers": (("X-A", "1\r\nY: 2"),)}, "headers[0].value", "must be Latin-1 without line breaks"),
        ({"headers": (("X-A", "…"),)}, "headers[0].value", "must be Latin-1 without line breaks"),
        (
            {"headers": (("Content-Length", "1"),)},
            "headers[0].name",
            "must not be Content-Length: the load tester sets it",
        ),
        ({"ca_certificates_pem": "x"}, "ca_certificates_pem", "must have -----BEGIN CERTIFICATE-----, has not"),
        ({"request_timeout_seconds": 0.0}, "request_timeout_seconds", "must be > 0, is 0"),
        ({"connect_timeout_seconds": NOT_A_NUMBER}, "connect_timeout_seconds", "must be > 0, is nan"),
    ],
)
def test_target_is_checked(change: dict[str, Any], field: str, problem: str) -> None:
    assert only(replace(SPEC, target=replace(TARGET, **change))) == (f"spec.target.{field}", problem)


def rated(kind: LoadKind = LoadKind.POISSON, rate_per_second: float = 1.0, burstiness: float = 1.0) -> Load:
    return Load(kind=kind, rate_per_second=rate_per_second, burstiness=burstiness)


@pytest.mark.parametrize(
    ("load", "field", "problem"),
    [
        (users(), "user_steps", "must have at least one step, from 0 seconds on"),
        (users((0, 0)), "user_steps[0].users_count", "must be >= 1, is 0"),
        (users((0, 1), (1, -3)), "user_steps[1].users_count", "must be >= 1, is -3"),
        (users((0, 100_001)), "user_steps[0].users_count", "must be at most 100,000, is 100,001"),
        (users((1, 1)), "user_steps[0].at_seconds", "must be 0, is 1"),
        (
            users((0, 1), (5, 2), (5, 3)),
            "user_steps[2].at_seconds",
            "must be greater than that of the step before, 5, is 5",
        ),
        (
            users((0, 1), (NOT_A_NUMBER, 2)),
            "user_steps[1].at_seconds",
            "must be greater than that of the step before, 0, is nan",
        ),
        (rated(rate_per_second=-1), "rate_per_second", "must be > 0, is -1"),
        (rated(rate_per_second=NOT_A_NUMBER), "rate_per_second", "must be > 0, is nan"),
        (rated(rate_per_second=INFINITE), "rate_per_second", "must be > 0, is inf"),
        (rated(rate_per_second=2e6), "rate_per_second", "must be at most 1,000,000, is 2,000,000"),
        (rated(LoadKind.GAMMA, burstiness=0), "burstiness", "must be > 0, is 0"),
        (replace(users((0, 1)), rate_per_second=3.0), "rate_per_second", "must not be given: users has no rate"),
        (
            replace(rated(), user_steps=users((0, 1)).user_steps),
            "user_steps",
            "must not be given: poisson has no users",
        ),
        (replace(rated(), request_count=-1), "request_count", "must be >= 0, is -1"),
        (Load(kind=LoadKind.ALL_AT_ONCE), "request_count", "must be >= 1, is 0"),
        (Load(kind=LoadKind.TRACE), "kind", "must not be trace: only requests of a workload model have times"),
    ],
)
def test_load_is_checked(load: Load, field: str, problem: str) -> None:
    assert only(staged(load)) == (f"spec.stages[1].load.{field}", problem)


def test_speed_of_a_trace_is_checked() -> None:
    spec = replace(staged(Load(kind=LoadKind.TRACE, speed=-2.0)), requests=WORKLOAD)
    assert only(spec) == ("spec.stages[1].load.speed", "must be > 0, is -2")


def test_windows_are_checked() -> None:
    assert only(staged(rated(), warm_up_seconds=-1)) == (
        "spec.stages[1].warm_up_seconds",
        "must be from 0 to 2,592,000, is -1",
    )
    assert only(staged(rated(), measure_seconds=0)) == ("spec.stages[1].measure_seconds", "must be > 0, is 0")


@pytest.mark.parametrize(
    ("change", "field", "problem"),
    [
        ({"kind": LoadKind.GAMMA}, "kind", "must be one of users, constant, poisson, is gamma"),
        ({"low": 0.0}, "low", "must be > 0, is 0"),
        ({"low": 1.5}, "low", "must be a whole number of users, is 1.5"),
        ({"low": 65.0}, "high", "must be at least low, 65, is 64"),
        ({"high": 1e6}, "high", "must be at most 100,000, is 1,000,000"),
        ({"precision": 0.0}, "precision", "must be > 0 and at most 1, is 0"),
        ({"confidence": 1.0}, "confidence", "must be at least 0.5 and less than 1, is 1"),
        ({"confidence": NOT_A_NUMBER}, "confidence", "must be at least 0.5 and less than 1, is nan"),
        ({"measure_seconds": -1.0}, "measure_seconds", "must be > 0, is -1"),
    ],
)
def test_search_is_checked(change: dict[str, Any], field: str, problem: str) -> None:
    spec = replace(SPEC, search=replace(SEARCH, **change), service_level=LEVEL)
    assert only(spec) == (f"spec.search.{field}", problem)


def test_search_needs_a_limit_and_a_share_that_can_be_shown() -> None:
    field, problem = only(replace(SPEC, search=SEARCH))
    assert (field, problem.split(":")[0]) == ("spec.service_level", "must have a limit for the search")
    field, problem = only(replace(SPEC, search=SEARCH, service_level=replace(LEVEL, share=1.0)))
    assert (field, problem.split(":")[0]) == ("spec.service_level.share", "must be less than 1 in a search")


def test_search_and_stages_exclude_each_other() -> None:
    spec = replace(SPEC, search=SEARCH, service_level=LEVEL, stages=DEFAULT_LADDER)
    assert only(spec) == ("spec.search", "must not be given with stages: leave one of them out")


@pytest.mark.parametrize("share", [0.0, 1.1, NOT_A_NUMBER])
def test_share_is_checked(share: float) -> None:
    spec = replace(SPEC, service_level=ServiceLevel(share=share))
    assert only(spec) == ("spec.service_level.share", f"must be > 0 and at most 1, is {share:g}")


@pytest.mark.parametrize("name", ["ttft_ms", "nttft_ms", "itl_ms", "tpot_ms", "end_to_end_ms"])
def test_limits_are_checked(name: str) -> None:
    spec = replace(SPEC, service_level=ServiceLevel(**{name: 0.0}))
    assert only(spec) == (f"spec.service_level.{name}", "must be > 0, is 0")


@pytest.mark.parametrize(
    ("change", "field", "problem"),
    [
        ({"seed": -1}, "sampling.seed", "must be >= 0, is -1"),
        ({"value_choice": "any"}, "sampling.value_choice", "must be centre, uniform, quantiles or empty, is 'any'"),
        ({"scales": (("a", 1.0), ("b", 0.0))}, "sampling.scales[1].factor", "must be > 0, is 0"),
        ({"scales": (("", 1.0),)}, "sampling.scales[0].parameter", "must not be empty"),
        ({"conditions": (" ",)}, "sampling.conditions[0]", "must not be empty"),
        ({"context_length": -1}, "sampling.context_length", "must be >= 0, is -1"),
        ({"shared_prefix_ratio": 1.5}, "shared_prefix_ratio", "must be from 0 to 1, is 1.5"),
        ({"prefix_group_count": -1}, "prefix_group_count", "must be >= 0, is -1"),
        ({"tokenizer_json": b"{"}, "tokenizer_json", "must be the content of a tokenizer.json, is no JSON"),
        ({"tokenizer_json": b"\xff"}, "tokenizer_json", "must be the content of a tokenizer.json, is no JSON"),
        ({"tokenizer_json": b"[]"}, "tokenizer_json", 'must be the content of a tokenizer.json, has no "model"'),
    ],
)
def test_workload_is_checked(change: dict[str, Any], field: str, problem: str) -> None:
    assert only(replace(SPEC, requests=replace(WORKLOAD, **change))) == (f"spec.workload.{field}", problem)


@pytest.mark.parametrize("name", ["", "Conversation", "-a", "a/b", "a" * 64, "a\n"])
def test_workload_id_is_checked(name: str) -> None:
    field, problem = only(replace(SPEC, requests=WorkloadRequests(workload_model=name)))
    assert field == "spec.workload.sampling.workload_model"
    assert problem.startswith("must be the id of a model or profile: 1 to 63 lower-case letters")


def test_synthetic_lengths_are_checked() -> None:
    spec = replace(SPEC, requests=SyntheticRequests(input_tokens=0, output_tokens=-1))
    assert pairs(spec) == [
        ("spec.synthetic.input_tokens", "must be >= 1, is 0"),
        ("spec.synthetic.output_tokens", "must be >= 1, is -1"),
    ]


@pytest.mark.parametrize(
    ("line", "problem"),
    [
        (b"{", "must be JSON: Expecting property name enclosed in double quotes at character 2"),
        (b'"text"', "must be a JSON object"),
        (b"{}", 'must have either "prompt" or "body"'),
        (b'{"prompt": "a", "body": {}}', 'must have either "prompt" or "body"'),
        (b'{"body": []}', '"body" must be a JSON object'),
        (b'{"prompt": ""}', '"prompt" must be a text that is not empty'),
        (b'{"prompt": 3}', '"prompt" must be a text that is not empty'),
        (b'{"prompt": "a", "output_tokens": 0}', '"output_tokens" must be a whole number from 1 to 10,000,000, is 0'),
        (
            b'{"prompt": "a", "input_tokens": "3"}',
            "\"input_tokens\" must be a whole number from 1 to 10,000,000, is '3'",
        ),
        (
            b'{"prompt": "a", "input_tokens": true}',
            '"input_tokens" must be a whole number from 1 to 10,000,000, is True',
        ),
    ],
)
def test_prompt_lines_are_checked_by_number(line: bytes, problem: str) -> None:
    jsonl = b'{"prompt": "a"}\n\n' + line + b"\n"
    assert only(replace(SPEC, requests=PromptRequests(jsonl=jsonl))) == ("spec.prompts.jsonl", f"line 3: {problem}")


@pytest.mark.parametrize("line", [b'{"prompt": "\xff"}', b'{"body": {"a": "\\uD800"}}', b"[" * 100_000])
def test_prompt_lines_that_no_json_parser_reads_are_refused(line: bytes) -> None:
    field, problem = only(replace(SPEC, requests=PromptRequests(jsonl=line)))
    assert field == "spec.prompts.jsonl"
    assert problem.startswith("line 1: must be JSON: ")


def test_body_is_refused_where_requests_are_no_json() -> None:
    target = Target(url="grpc://server", protocol=Protocol.TGIS)
    spec = replace(SPEC, target=target, requests=PromptRequests(jsonl=b'{"body": {}}'))
    assert only(spec) == ("spec.prompts.jsonl", 'line 1: must have a "prompt": requests of tgis are no JSON')


def test_at_most_twenty_lines_are_listed() -> None:
    found = pairs(replace(SPEC, requests=PromptRequests(jsonl=b"{}\n" * 25)))
    assert len(found) == 21
    assert found[19][1].startswith("line 20: ")
    assert found[20] == ("spec.prompts.jsonl", "5 more lines are wrong")


@pytest.mark.parametrize("jsonl", [b"", b"\n \n"])
def test_no_prompts_are_refused(jsonl: bytes) -> None:
    field, problem = only(replace(SPEC, requests=PromptRequests(jsonl=jsonl)))
    assert (field, problem[:31]) == ("spec.prompts.jsonl", "must have at least one line, e.")


def test_workers_seed_and_tokenizer_are_checked() -> None:
    assert pairs(replace(SPEC, seed=2**64, worker_count=257, reply_tokenizer_json=b"x")) == [
        ("spec.seed", f"must be at most {2**64 - 1:,}, is {2**64:,}"),
        ("spec.worker_count", "must be at most 256, is 257"),
        ("spec.reply_tokenizer_json", "must be the content of a tokenizer.json, is no JSON"),
    ]


def test_what_is_sent_at_once_has_no_warm_up() -> None:
    """All of it is sent at the start: after a warm-up there would be nothing to measure."""
    spec = staged(Load(kind=LoadKind.ALL_AT_ONCE, request_count=1), warm_up_seconds=1.0)
    field, problem = only(spec)
    assert field == "spec.stages[1].warm_up_seconds"
    assert problem == "must be 0, is 1: all requests are sent at the start"


def test_a_step_after_the_end_of_its_stage_is_refused() -> None:
    field, problem = only(staged(users((0, 1), (30, 2)), warm_up_seconds=10.0, measure_seconds=20.0))
    assert field == "spec.stages[1].load.user_steps[1].at_seconds"
    assert problem == "must be before the end of the stage, 30 s, is 30"


def test_everything_wrong_is_said_at_once() -> None:
    spec = LoadTestSpec(
        target=Target(url="", request_timeout_seconds=-1),
        requests=SyntheticRequests(input_tokens=0, output_tokens=1),
        stages=(Stage(load=users((0, 0)), warm_up_seconds=-1, measure_seconds=0),),
        service_level=ServiceLevel(share=2),
        worker_count=-1,
    )
    assert [violation.field for violation in spec_violations(spec)] == [
        "spec.target.url",
        "spec.target.request_timeout_seconds",
        "spec.synthetic.input_tokens",
        "spec.stages[0].load.user_steps[0].users_count",
        "spec.stages[0].warm_up_seconds",
        "spec.stages[0].measure_seconds",
        "spec.service_level.share",
        "spec.worker_count",
    ]
    assert all(isinstance(violation, Violation) for violation in spec_violations(spec))
