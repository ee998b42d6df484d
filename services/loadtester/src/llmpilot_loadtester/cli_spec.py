"""The load test that the options of `llm-pilot loadtest run` mean.

Invariant: every wrong option is told at once, by the name that it has on the command line.
"""

from pathlib import Path
from urllib.parse import urlsplit

import click

from llmpilot_contracts.errors import InvalidInputError, Violation
from llmpilot_loadtester.cli_options import DEFAULT_PROFILE, SECONDS, RunOptions
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

_LONGEST_WARM_UP_SECONDS = 10.0
_WARM_UP_SHARE = 0.25


def spec_of(options: RunOptions) -> LoadTestSpec:
    """Return the load test that the options mean; InvalidInputError with everything that is wrong."""
    return _SpecReader(options).read()


def llm_config_of(options: RunOptions) -> str:
    """Return the text of the config.json that was given, if any; raises InvalidInputError."""
    if options.llm_config is None:
        return ""
    try:
        return options.llm_config.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise InvalidInputError([Violation("--llm-config", f"{options.llm_config} cannot be read: {error}")]) from error


class _SpecReader:
    def __init__(self, options: RunOptions) -> None:
        self._options = options
        self._violations: list[Violation] = []

    def read(self) -> LoadTestSpec:
        options = self._options
        if options.llm_config is not None and not options.llm:
            self._wrong("--llm-config", "goes with --llm, the name that measurements are published under")
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
                input_tokens=options.input_tokens or 0,
                output_tokens=options.output_tokens or 0,
                seed=options.seed,
                fixed_output_length=not options.free_length,
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
        if options.at_once is not None:
            for name, value in {"--warm-up": options.warm_up, "--request-count": options.request_count}.items():
                if value is not None:
                    self._wrong(name, "goes without --at-once, which sends so many requests when the stage starts")
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
