"""What is wrong with a load test, before anything is sent.

Invariant: yields every violation at once, each with the path of its field in loadtest.proto and what to do.
"""

import math
import re
from collections.abc import Iterator
from urllib.parse import SplitResult, urlsplit

from llmpilot_contracts.errors import Violation
from llmpilot_loadtester.domain.request_checks import (
    LARGEST_SEED,
    positive_violations,
    request_violations,
    shown,
    tokenizer_violations,
    whole_violations,
)
from llmpilot_loadtester.domain.spec import (
    RATED,
    Load,
    LoadKind,
    LoadSearch,
    LoadTestSpec,
    Protocol,
    ServiceLevel,
    Stage,
    Target,
    WorkloadRequests,
)

LARGEST_WORKER_COUNT = 256
LARGEST_USERS_COUNT = 100_000
LARGEST_RATE_PER_SECOND = 1_000_000.0
LARGEST_REQUEST_COUNT = 1_000_000_000
LARGEST_ALL_AT_ONCE = 100_000
LONGEST_SECONDS = 30 * 24 * 3600.0
SEARCHED_KINDS = (LoadKind.USERS, LoadKind.CONSTANT, LoadKind.POISSON)
LIMIT_NAMES = ("ttft_ms", "nttft_ms", "itl_ms", "tpot_ms", "end_to_end_ms")
_HEADER_NAME = re.compile(r"[!#$%&'*+.^_`|~0-9A-Za-z-]+")
_HEADER_VALUE = re.compile(r"[^\x00-\x08\x0a-\x1f\x7f]*")
_OWN_HEADERS = frozenset({"connection", "content-length", "transfer-encoding"})
_SPACE_OR_CONTROL = re.compile(r"[\x00-\x20\x7f]")


def spec_violations(spec: LoadTestSpec) -> list[Violation]:
    """Return everything that is wrong with a spec; what has none can be run."""
    return list(_violations(spec))


def _violations(spec: LoadTestSpec) -> Iterator[Violation]:
    yield from _target_violations(spec.target)
    yield from request_violations(spec.requests, spec.target.protocol)
    for index, stage in enumerate(spec.stages):
        yield from _stage_violations(f"spec.stages[{index}]", stage, spec)
    yield from _level_violations(spec.service_level)
    if spec.search is not None:
        if spec.stages:
            yield Violation("spec.search", "must not be given with stages: leave one of them out")
        yield from _search_violations(spec.search, spec.service_level)
    yield from whole_violations("spec.seed", spec.seed, 0, LARGEST_SEED)
    yield from whole_violations("spec.worker_count", spec.worker_count, 0, LARGEST_WORKER_COUNT)
    yield from tokenizer_violations("spec.reply_tokenizer_json", spec.reply_tokenizer_json)


def _target_violations(target: Target) -> Iterator[Violation]:
    field = "spec.target"
    problem = _url_problem(target.url, target.protocol)
    if problem:
        yield Violation(f"{field}.url", problem)
    if _SPACE_OR_CONTROL.search(target.api_key) or not target.api_key.isascii():
        yield Violation(f"{field}.api_key", "must be ASCII without spaces and line breaks")
    for index, (name, value) in enumerate(target.headers):
        if not _HEADER_NAME.fullmatch(name):
            yield Violation(f"{field}.headers[{index}].name", f"must be a header's name, is {shown(name)}")
        elif name.lower() in _OWN_HEADERS:
            yield Violation(f"{field}.headers[{index}].name", f"must not be {name}: the load tester sets it")
        if not _HEADER_VALUE.fullmatch(value) or any(ord(letter) > 0xFF for letter in value):  # noqa: PLR2004 Latin-1
            yield Violation(f"{field}.headers[{index}].value", "must be Latin-1 without line breaks")
    if target.ca_certificates_pem and "-----BEGIN CERTIFICATE-----" not in target.ca_certificates_pem:
        yield Violation(f"{field}.ca_certificates_pem", "must have -----BEGIN CERTIFICATE-----, has not")
    for name in ("request_timeout_seconds", "connect_timeout_seconds"):
        yield from positive_violations(f"{field}.{name}", getattr(target, name), most=LONGEST_SECONDS)


def _url_problem(url: str, protocol: Protocol) -> str | None:
    schemes = ("grpc", "grpcs") if protocol is Protocol.TGIS else ("http", "https")
    expected = f'must be like "{schemes[0]}://host:port" or "{schemes[1]}://host:port"'
    if not url:
        return f"{expected}, is empty"
    if _SPACE_OR_CONTROL.search(url):
        return f"{expected}, has a space or a line break"
    try:
        parts = urlsplit(url)
        port = parts.port
    except ValueError as error:
        return f"{expected}: {error}"
    if parts.scheme not in schemes:
        return f"{expected} for {protocol.value}, is {shown(_without_key(url))}"
    if not parts.hostname or port == 0:
        return f"{expected}, has no {'port' if parts.hostname else 'host'}"
    return _surplus_problem(parts)


def _surplus_problem(parts: SplitResult) -> str | None:
    if parts.username is not None or parts.password is not None:
        return "must have no user or password: give an api_key or a header"
    if parts.query or parts.fragment:
        return "must have neither a query nor a fragment"
    return None


def _without_key(url: str) -> str:
    """A user and a password before the host are not for messages."""
    return re.sub(r"//[^/]*@", "//...@", url)


def _stage_violations(field: str, stage: Stage, spec: LoadTestSpec) -> Iterator[Violation]:
    yield from _load_violations(f"{field}.load", stage.load, spec)
    yield from _duration_violations(field, stage.warm_up_seconds, stage.measure_seconds)
    if stage.load.kind is LoadKind.ALL_AT_ONCE and stage.warm_up_seconds > 0:
        yield Violation(
            f"{field}.warm_up_seconds", f"must be 0, is {stage.warm_up_seconds:g}: all requests are sent at the start"
        )
    end_seconds = stage.warm_up_seconds + stage.measure_seconds
    for index, step in enumerate(stage.load.user_steps[1:], start=1):
        if end_seconds <= step.at_seconds < math.inf:
            problem = f"must be before the end of the stage, {end_seconds:g} s, is {step.at_seconds:g}"
            yield Violation(f"{field}.load.user_steps[{index}].at_seconds", problem)


def _duration_violations(field: str, warm_up_seconds: float, measure_seconds: float) -> Iterator[Violation]:
    if not 0 <= warm_up_seconds <= LONGEST_SECONDS:
        yield Violation(f"{field}.warm_up_seconds", f"must be from 0 to {LONGEST_SECONDS:,.0f}, is {warm_up_seconds:g}")
    yield from positive_violations(f"{field}.measure_seconds", measure_seconds, most=LONGEST_SECONDS)


def _load_violations(field: str, load: Load, spec: LoadTestSpec) -> Iterator[Violation]:
    if load.is_closed:
        yield from _step_violations(f"{field}.user_steps", load)
    elif load.user_steps:
        yield Violation(f"{field}.user_steps", f"must not be given: {load.kind.value} has no users")
    if load.kind in RATED:
        yield from positive_violations(f"{field}.rate_per_second", load.rate_per_second, most=LARGEST_RATE_PER_SECOND)
    elif load.rate_per_second:
        yield Violation(f"{field}.rate_per_second", f"must not be given: {load.kind.value} has no rate")
    if load.kind is LoadKind.GAMMA:
        yield from positive_violations(f"{field}.burstiness", load.burstiness)
    if load.kind is LoadKind.TRACE:
        yield from positive_violations(f"{field}.speed", load.speed)
        if not isinstance(spec.requests, WorkloadRequests):
            yield Violation(f"{field}.kind", "must not be trace: only requests of a workload model have times")
    at_once = load.kind is LoadKind.ALL_AT_ONCE
    most = LARGEST_ALL_AT_ONCE if at_once else LARGEST_REQUEST_COUNT
    yield from whole_violations(f"{field}.request_count", load.request_count, int(at_once), most)


def _step_violations(field: str, load: Load) -> Iterator[Violation]:
    if not load.user_steps:
        yield Violation(field, "must have at least one step, from 0 seconds on")
        return
    first = load.user_steps[0].at_seconds
    if first != 0:
        yield Violation(f"{field}[0].at_seconds", f"must be 0, is {first:g}")
    before_seconds = 0.0
    for index, step in enumerate(load.user_steps):
        yield from whole_violations(f"{field}[{index}].users_count", step.users_count, 1, LARGEST_USERS_COUNT)
        if index and not before_seconds < step.at_seconds < math.inf:
            yield Violation(
                f"{field}[{index}].at_seconds",
                f"must be greater than that of the step before, {before_seconds:g}, is {step.at_seconds:g}",
            )
        before_seconds = step.at_seconds


def _level_violations(level: ServiceLevel) -> Iterator[Violation]:
    for name in LIMIT_NAMES:
        limit = getattr(level, name)
        if limit is not None:
            yield from positive_violations(f"spec.service_level.{name}", limit)
    if not 0 < level.share <= 1:
        yield Violation("spec.service_level.share", f"must be > 0 and at most 1, is {level.share:g}")


def _search_violations(search: LoadSearch, level: ServiceLevel) -> Iterator[Violation]:
    field = "spec.search"
    if search.kind not in SEARCHED_KINDS:
        kinds = ", ".join(kind.value for kind in SEARCHED_KINDS)
        yield Violation(f"{field}.kind", f"must be one of {kinds}, is {search.kind.value}")
    yield from _bound_violations(field, search)
    if not 0 < search.precision <= 1:
        yield Violation(f"{field}.precision", f"must be > 0 and at most 1, is {search.precision:g}")
    if not 0.5 <= search.confidence < 1:  # noqa: PLR2004 a coin is right that often
        yield Violation(f"{field}.confidence", f"must be at least 0.5 and less than 1, is {search.confidence:g}")
    yield from _duration_violations(field, search.warm_up_seconds, search.measure_seconds)
    if all(getattr(level, name) is None for name in LIMIT_NAMES):
        names = ", ".join(LIMIT_NAMES)
        yield Violation("spec.service_level", f"must have a limit for the search: {names}")
    if level.share == 1:
        yield Violation(
            "spec.service_level.share",
            "must be less than 1 in a search: no number of requests shows that all will be within the limits",
        )


def _bound_violations(field: str, search: LoadSearch) -> Iterator[Violation]:
    is_users = search.kind is LoadKind.USERS
    most = LARGEST_USERS_COUNT if is_users else LARGEST_RATE_PER_SECOND
    for name in ("low", "high"):
        bound = getattr(search, name)
        yield from positive_violations(f"{field}.{name}", bound, most=most)
        if is_users and 0 < bound < math.inf and not float(bound).is_integer():
            yield Violation(f"{field}.{name}", f"must be a whole number of users, is {bound:g}")
    if search.high < search.low:
        yield Violation(f"{field}.high", f"must be at least low, {search.low:g}, is {search.high:g}")
