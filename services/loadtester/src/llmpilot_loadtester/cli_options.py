"""The options of `llm-pilot loadtest run`, and the load test that they mean.

Invariant: every wrong option is told at once, by the name that it has on the command line.
"""

import re
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import click

from llmpilot_contracts.errors import InvalidInputError, Violation
from llmpilot_loadtester.domain.spec import (
    DEFAULT_LADDER,
    Load,
    LoadKind,
    LoadSearch,
    LoadTestSpec,
    PromptRequests,
    Protocol,
    Requests,
    ServiceLevel,
    Stage,
    SyntheticRequests,
    Target,
    UserStep,
    WorkloadRequests,
)

Callback = Callable[..., None]

DEFAULT_PROFILE = "production"
_LONGEST_WARM_UP_SECONDS = 10.0
_WARM_UP_SHARE = 0.25
_UNITS = {"": 1.0, "ms": 0.001, "s": 1.0, "m": 60.0, "h": 3600.0}


class Seconds(click.ParamType[float]):
    """A length of time such as 20s, 500ms, 2m, 1h; a bare number is seconds."""

    name = "time"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> float:
        """Return seconds."""
        if isinstance(value, float):
            return value
        match = re.fullmatch(r"(\d+(?:\.\d+)?|\.\d+)(ms|s|m|h|)", str(value).strip())
        if match is None:
            self.fail(f"{value!r} is no time; write 20s, 500ms, 2m or 1h", param, ctx)
        return float(match[1]) * _UNITS[match[2]]


SECONDS = Seconds()


@dataclass(frozen=True, slots=True, kw_only=True)
class RunOptions:
    """The options as they were given; None: not given."""

    target: str
    protocol: str | None
    served_model: str
    api_key: str
    headers: tuple[str, ...]
    ca_certificates: Path | None
    insecure: bool
    request_timeout: float
    connect_timeout: float
    profile: str | None
    where: tuple[str, ...]
    values: str | None
    independent: bool
    scale: tuple[str, ...]
    context_length: int | None
    replay: bool
    tokenizer: Path | None
    shared_prefix_ratio: float | None
    prefix_groups: int | None
    prompts: Path | None
    input_tokens: int | None
    output_tokens: int | None
    free_length: bool
    users: str | None
    ramp: bool
    rate: str | None
    arrivals: str | None
    burstiness: float | None
    speed: float | None
    at_once: int | None
    request_count: int | None
    duration: float | None
    warm_up: float | None
    search: str | None
    low: float | None
    high: float | None
    precision: float | None
    confidence: float | None
    ttft_ms: float | None
    nttft_ms: float | None
    itl_ms: float | None
    tpot_ms: float | None
    end_to_end_ms: float | None
    slo_share: float | None
    seed: int
    workers: int
    llm: str
    gpu_profile: str
    reply_tokenizer: Path | None


_path = click.Path(path_type=Path)
_OPTIONS = (
    click.option(
        "--target", required=True, metavar="URL", help="http://HOST:PORT, https://..., or grpc://... of TGIS."
    ),
    click.option(
        "--protocol",
        type=click.Choice([protocol.value for protocol in Protocol]),
        help="What the server speaks.  [default: tgis for grpc URLs, by the path of others, else openai-completions]",
    ),
    click.option("--served-model", default="", help="Name of the served model.  [default: asked from the server]"),
    click.option(
        "--api-key",
        default="",
        envvar="LLMPILOT_API_KEY",
        help="Sent as a bearer token; better by the variable LLMPILOT_API_KEY, as others see command lines.",
    ),
    click.option(
        "--header", "headers", multiple=True, metavar="NAME=VALUE", help="Header of every request; repeatable."
    ),
    click.option("--ca-certificates", type=_path, help="PEM file of the authorities to trust."),
    click.option("--insecure", is_flag=True, help="Accept any certificate."),
    click.option("--request-timeout", type=SECONDS, default=600.0, help="Limit of one request.  [default: 600s]"),
    click.option("--connect-timeout", type=SECONDS, default=10.0, help="Limit of a connection.  [default: 10s]"),
    click.option(
        "--profile", help=f"Workload profile, or model, that requests are drawn from.  [default: {DEFAULT_PROFILE}]"
    ),
    click.option("--where", multiple=True, metavar="CONDITION", help='Only such requests, e.g. "input_tokens <= 874".'),
    click.option("--values", type=click.Choice(["centre", "uniform", "quantiles"]), help="Which value of its bin."),
    click.option("--independent", is_flag=True, help="Draw every parameter from its own distribution."),
    click.option("--scale", multiple=True, metavar="NAME=FACTOR", help="Scaled parameter; repeatable."),
    click.option("--context-length", type=int, help="Tokens of prompt and reply; prompts are cut."),
    click.option("--replay", is_flag=True, help="The kept requests of the trace, in their order."),
    click.option("--tokenizer", type=_path, help="tokenizer.json by whose count prompts have the drawn lengths."),
    click.option("--shared-prefix-ratio", type=float, help="Share of a prompt in common with others of its group."),
    click.option("--prefix-groups", type=int, help="Groups of prompts that share a prefix."),
    click.option(
        "--prompts", type=_path, help='JSON lines {"prompt": ..., "output_tokens": ...} instead of a profile.'
    ),
    click.option("--input-tokens", type=int, help="Made-up prompts of about this length instead of a profile."),
    click.option("--output-tokens", type=int, help="Reply length of made-up prompts, or where --prompts has none."),
    click.option("--free-length", is_flag=True, help="Let the server end replies before the drawn length."),
    click.option("--users", metavar="N,N,...", help="Concurrent users, a stage each; 0s:1/30s:8 steps within a stage."),
    click.option("--ramp", is_flag=True, help="Go in a straight line between the steps of a stage."),
    click.option("--rate", metavar="R,R,...", help="Requests per second, a stage each."),
    click.option(
        "--arrivals",
        type=click.Choice(["poisson", "constant", "gamma", "trace"]),
        help="When requests are sent.  [default: poisson with --rate]",
    ),
    click.option("--burstiness", type=float, help="Of gamma arrivals: 1 is Poisson, less is burstier."),
    click.option("--speed", type=float, help="How many times faster a trace is replayed."),
    click.option("--at-once", type=int, help="Send so many requests at once."),
    click.option("--request-count", type=int, help="Requests of a stage at most."),
    click.option("--duration", type=SECONDS, help="How long each stage is measured, e.g. 20s.  [default: 2m]"),
    click.option("--warm-up", type=SECONDS, help="Load before that.  [default: a quarter of it, at most 10s]"),
    click.option("--search", type=click.Choice(["users", "rate"]), help="Find the largest load that meets the limits."),
    click.option("--low", type=float, help="Smallest load tried.  [default: 1]"),
    click.option("--high", type=float, help="Largest load tried.  [default: 256 users, 100 requests/s]"),
    click.option("--precision", type=float, help="Share of the answer up to which it is known.  [default: 0.05]"),
    click.option("--confidence", type=float, help="How sure each decision is.  [default: 0.95]"),
    click.option("--ttft-ms", type=float, help="Limit of the time to first token."),
    click.option("--nttft-ms", type=float, help="Limit of the time to first token per input token."),
    click.option("--itl-ms", type=float, help="Limit of a request's mean inter-token latency."),
    click.option("--tpot-ms", type=float, help="Limit of the time per output token."),
    click.option("--end-to-end-ms", type=float, help="Limit of the whole request."),
    click.option("--slo-share", type=float, help="Share of requests that must be within the limits.  [default: 0.95]"),
    click.option("--seed", type=int, default=0, show_default=True, help="The same seed sends the same requests."),
    click.option(
        "--workers", type=int, default=0, help="Processes that send.  [default: as many as CPUs, and users, allow]"
    ),
    click.option("--llm", default="", help="Bundled LLM, or config.json, under test; publishes measurements."),
    click.option("--gpu-profile", default="", help="GPU profile that serves it, e.g. 1xA100-40GB; goes with --llm."),
    click.option("--reply-tokenizer", type=_path, help="tokenizer.json that counts replies without a usage report."),
)


def run_options(callback: Callback) -> Callback:
    """Add the options to a command's function."""
    for option in reversed(_OPTIONS):
        callback = option(callback)
    return callback


def spec_of(options: RunOptions) -> LoadTestSpec:
    """Return the load test that the options mean; InvalidInputError with everything that is wrong."""
    return _SpecReader(options).read()


class _SpecReader:
    def __init__(self, options: RunOptions) -> None:
        self._options = options
        self._violations: list[Violation] = []

    def read(self) -> LoadTestSpec:
        options = self._options
        spec = LoadTestSpec(
            target=self._target(),
            requests=self._requests(),
            stages=self._stages(),
            search=self._search(),
            service_level=ServiceLevel(
                ttft_ms=options.ttft_ms,
                nttft_ms=options.nttft_ms,
                itl_ms=options.itl_ms,
                tpot_ms=options.tpot_ms,
                end_to_end_ms=options.end_to_end_ms,
                share=ServiceLevel().share if options.slo_share is None else options.slo_share,
            ),
            seed=options.seed,
            worker_count=options.workers,
            llm_name=options.llm,
            gpu_profile=options.gpu_profile,
            reply_tokenizer_json=self._file("--reply-tokenizer", options.reply_tokenizer),
        )
        if self._violations:
            raise InvalidInputError(self._violations)
        return spec

    def _wrong(self, option: str, problem: str) -> None:
        self._violations.append(Violation(option, problem))

    def _file(self, option: str, path: Path | None) -> bytes:
        if path is None:
            return b""
        try:
            return path.read_bytes()
        except OSError as error:
            self._wrong(option, f"{path} cannot be read: {error.strerror}")
            return b""

    def _target(self) -> Target:
        options = self._options
        headers = []
        for text in options.headers:
            name, equals, value = text.partition("=")
            if not equals or not name.strip():
                self._wrong("--header", f"must be NAME=VALUE, is {name!r} without a value")
            else:
                headers.append((name.strip(), value.strip()))
        return Target(
            url=options.target if "://" in options.target else f"http://{options.target}",
            protocol=Protocol(options.protocol) if options.protocol else _protocol_of(options.target),
            served_model=options.served_model,
            api_key=options.api_key,
            headers=tuple(headers),
            ca_certificates_pem=self._file("--ca-certificates", options.ca_certificates).decode(errors="replace"),
            insecure=options.insecure,
            request_timeout_seconds=options.request_timeout,
            connect_timeout_seconds=options.connect_timeout,
        )

    def _requests(self) -> Requests:
        options = self._options
        sources = {"--profile": options.profile, "--prompts": options.prompts, "--input-tokens": options.input_tokens}
        given = [name for name, value in sources.items() if value is not None]
        if len(given) > 1:
            self._wrong(given[1], f"goes without {given[0]}: requests come from one source")
        chosen = given[0] if given else "--profile"
        self._check_source_options(chosen)
        if chosen == "--prompts":
            return PromptRequests(
                jsonl=self._file("--prompts", options.prompts),
                output_tokens=128 if options.output_tokens is None else options.output_tokens,
                fixed_output_length=not options.free_length,
            )
        if chosen == "--input-tokens":
            if options.output_tokens is None:
                self._wrong("--output-tokens", "is needed by --input-tokens")
            return SyntheticRequests(
                input_tokens=options.input_tokens or 0, output_tokens=options.output_tokens or 0, seed=options.seed
            )
        return self._workload()

    def _check_source_options(self, chosen: str) -> None:
        options = self._options
        of_profiles: dict[str, object] = {
            "--where": options.where,
            "--values": options.values,
            "--independent": options.independent,
            "--scale": options.scale,
            "--context-length": options.context_length,
            "--replay": options.replay,
            "--tokenizer": options.tokenizer,
            "--shared-prefix-ratio": options.shared_prefix_ratio,
            "--prefix-groups": options.prefix_groups,
        }
        if chosen != "--profile":
            for name, value in of_profiles.items():
                if value:
                    self._wrong(name, f"goes with --profile, not with {chosen}")
        elif options.output_tokens is not None:
            self._wrong("--output-tokens", "goes with --prompts or --input-tokens")

    def _workload(self) -> WorkloadRequests:
        options = self._options
        scales = []
        for text in options.scale:
            name, _, factor = text.partition("=")
            try:
                scales.append((name.strip(), float(factor)))
            except ValueError:
                self._wrong("--scale", f"must be NAME=FACTOR, is {text!r}")
        return WorkloadRequests(
            workload_model=options.profile or DEFAULT_PROFILE,
            seed=options.seed,
            conditions=options.where,
            value_choice=options.values or "",
            independent=options.independent,
            scales=tuple(scales),
            context_length=options.context_length or 0,
            replay=options.replay or options.arrivals == "trace",
            fixed_output_length=not options.free_length,
            tokenizer_json=self._file("--tokenizer", options.tokenizer),
            shared_prefix_ratio=options.shared_prefix_ratio or 0.0,
            prefix_group_count=options.prefix_groups or 0,
        )

    def _stages(self) -> tuple[Stage, ...]:
        options = self._options
        is_trace = options.arrivals == "trace"
        loads = {"--users": options.users, "--rate": options.rate, "--at-once": options.at_once}
        given = [name for name, value in loads.items() if value is not None] + ["--arrivals trace"] * is_trace
        if len(given) > 1:
            self._wrong(given[1].split()[0], f"goes without {given[0]}: a load test has one kind of load")
        self._check_load_options()
        if options.search is not None:
            for name in given:
                self._wrong(name.split()[0], "goes without --search, which chooses the load")
            return ()
        if options.duration is not None and not 0 < options.duration < float("inf"):
            self._wrong("--duration", f"must be > 0, is {options.duration:g} s")
        limit = options.request_count or 0
        rates = [] if options.rate is None else self._rates(options.rate, limit)
        users = [] if options.users is None else self._users(options.users, limit)
        if options.at_once is not None:
            at_once = Load(kind=LoadKind.ALL_AT_ONCE, request_count=options.at_once)
            return (self._stage(at_once, warm_up_seconds=0.0),)
        if is_trace:
            trace = Load(kind=LoadKind.TRACE, speed=_or(options.speed, 1.0), request_count=limit)
            return (self._stage(trace, warm_up_seconds=0.0),)
        if rates or users:
            return tuple(self._stage(load) for load in rates or users)
        return tuple(self._stage(stage.load) for stage in DEFAULT_LADDER)

    def _check_load_options(self) -> None:
        options = self._options
        if options.arrivals in {"constant", "gamma", "poisson"} and options.rate is None and options.search != "rate":
            self._wrong("--arrivals", f"{options.arrivals} needs --rate")
        if options.burstiness is not None and options.arrivals != "gamma":
            self._wrong("--burstiness", "goes with --arrivals gamma")
        if options.speed is not None and options.arrivals != "trace":
            self._wrong("--speed", "goes with --arrivals trace")
        if options.ramp and options.users is None:
            self._wrong("--ramp", "goes with the steps of --users, e.g. 0s:1/60s:32")
        of_search = {"--low": options.low, "--high": options.high}
        of_search |= {"--precision": options.precision, "--confidence": options.confidence}
        if options.search is None:
            for name, value in of_search.items():
                if value is not None:
                    self._wrong(name, "goes with --search")

    def _rates(self, text: str, limit: int) -> list[Load]:
        kind = LoadKind(self._options.arrivals or "poisson")
        burstiness = _or(self._options.burstiness, 1.0)
        loads = []
        for part in text.split(","):
            try:
                rate = float(part)
            except ValueError:
                self._wrong("--rate", f"must be numbers like 10,20.5, has {part!r}")
                continue
            if not 0 < rate < float("inf"):
                self._wrong("--rate", f"must be > 0, is {part.strip()}")
                continue
            loads.append(Load(kind=kind, rate_per_second=rate, burstiness=burstiness, request_count=limit))
        return loads

    def _users(self, text: str, limit: int) -> list[Load]:
        loads = []
        for part in text.split(","):
            try:
                steps = tuple(_user_step(step) for step in part.split("/"))
            except (ValueError, click.BadParameter):
                self._wrong("--users", f"must be numbers like 1,2,4 or steps like 0s:1/30s:8, has {part!r}")
                continue
            if any(step.users_count < 1 for step in steps):
                self._wrong("--users", f"must be >= 1, is {part.strip()}")
                continue
            loads.append(Load(kind=LoadKind.USERS, user_steps=steps, ramp=self._options.ramp, request_count=limit))
        return loads

    def _stage(self, load: Load, *, warm_up_seconds: float | None = None) -> Stage:
        measure_seconds = _or(self._options.duration, 120.0)
        given = self._options.warm_up
        chosen = warm_up_seconds if warm_up_seconds is not None else _warm_up_seconds(measure_seconds)
        return Stage(load=load, warm_up_seconds=_or(given, chosen), measure_seconds=measure_seconds)

    def _search(self) -> LoadSearch | None:
        options = self._options
        if options.search is None:
            return None
        limits = (options.ttft_ms, options.nttft_ms, options.itl_ms, options.tpot_ms, options.end_to_end_ms)
        if all(limit is None for limit in limits):
            self._wrong("--search", "needs a limit, e.g. --ttft-ms 500")
        is_rate = options.search == "rate"
        measure_seconds = _or(options.duration, 30.0)
        return LoadSearch(
            kind=LoadKind(options.arrivals or "poisson") if is_rate else LoadKind.USERS,
            low=_or(options.low, 1.0),
            high=_or(options.high, 100.0 if is_rate else 256.0),
            precision=_or(options.precision, 0.05),
            confidence=_or(options.confidence, 0.95),
            warm_up_seconds=_or(options.warm_up, _warm_up_seconds(measure_seconds)),
            measure_seconds=measure_seconds,
        )


def _or(value: float | None, default: float) -> float:
    return default if value is None else value


def _warm_up_seconds(measure_seconds: float) -> float:
    return min(_LONGEST_WARM_UP_SECONDS, _WARM_UP_SHARE * measure_seconds)


def _user_step(text: str) -> UserStep:
    at, colon, users = text.rpartition(":")
    return UserStep(at_seconds=SECONDS.convert(at, None, None) if colon else 0.0, users_count=int(users))


def _protocol_of(url: str) -> Protocol:
    parts = urlsplit(url)
    if parts.scheme in {"grpc", "grpcs"}:
        return Protocol.TGIS
    path = parts.path.rstrip("/")
    if path.endswith("/chat/completions"):
        return Protocol.OPENAI_CHAT
    if path.endswith(("/generate_stream", "/generate")):
        return Protocol.TGI
    return Protocol.OPENAI_COMPLETIONS
