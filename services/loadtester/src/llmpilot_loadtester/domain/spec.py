"""What a load test does: target, requests, loads, limits.

Invariant: `spec_violations` finds everything that is wrong with a spec before anything is sent; a spec without
violations can be run.
"""

from collections.abc import Iterator
from dataclasses import dataclass, field
from enum import StrEnum

_SHORTEST_SECRET = 4
"""Characters; what is shorter would be found in any text."""
LARGEST_STAGE_COUNT = 100
"""All of their results are in one message on NATS."""


class Protocol(StrEnum):
    """What an inference server speaks."""

    OPENAI_COMPLETIONS = "openai-completions"
    OPENAI_CHAT = "openai-chat"
    TGI = "tgi"
    TGIS = "tgis"


@dataclass(frozen=True, slots=True, kw_only=True)
class Target:
    """The server under load."""

    url: str
    """http, https, grpc or grpcs; a path prefix is kept."""
    protocol: Protocol = Protocol.OPENAI_COMPLETIONS
    served_model: str = ""
    """Empty: asked from the server."""
    api_key: str = field(default="", repr=False)
    headers: tuple[tuple[str, str], ...] = field(default=(), repr=False)
    ca_certificates_pem: str = field(default="", repr=False)
    """Empty: the system's."""
    insecure: bool = False
    """Accept any certificate."""
    request_timeout_seconds: float = 600.0
    connect_timeout_seconds: float = 10.0

    def without_secrets(self, text: str) -> str:
        """Return what a server said without the key and the values of headers, which some servers repeat."""
        for secret in (self.api_key, *(value.strip() for _, value in self.headers)):
            if len(secret) >= _SHORTEST_SECRET:
                text = text.replace(secret, "(not shown)")
        return text


class LoadKind(StrEnum):
    """How requests are sent."""

    USERS = "users"
    """Closed loop: each user sends when the last reply has come."""
    CONSTANT = "constant"
    POISSON = "poisson"
    GAMMA = "gamma"
    TRACE = "trace"
    """At the arrival times of the requests themselves."""
    ALL_AT_ONCE = "all-at-once"


RATED = (LoadKind.CONSTANT, LoadKind.POISSON, LoadKind.GAMMA)


@dataclass(frozen=True, slots=True, kw_only=True)
class UserStep:
    """From a moment on, this many users."""

    at_seconds: float
    """After the start of the stage."""
    users_count: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Load:
    """A load; fields of other kinds keep their defaults."""

    kind: LoadKind
    user_steps: tuple[UserStep, ...] = ()
    ramp: bool = False
    """Whether the number of users goes in a straight line from step to step."""
    rate_per_second: float = 0.0
    burstiness: float = 1.0
    """Of gamma arrivals: 1 / CV^2."""
    speed: float = 1.0
    request_count: int = 0
    """Requests at most; 0: no limit."""

    @property
    def is_closed(self) -> bool:
        """Whether users wait for replies."""
        return self.kind is LoadKind.USERS

    @property
    def most_users(self) -> int | None:
        """The largest number of users; None where arrivals are scheduled."""
        return max((step.users_count for step in self.user_steps), default=0) if self.is_closed else None

    @property
    def label(self) -> str:
        """A few words, e.g. "8 users" or "poisson 100/s"."""
        if self.is_closed:
            steps = [f"{step.users_count}" for step in self.user_steps]
            return f"{'-'.join(steps)} user{'' if steps == ['1'] else 's'}{' ramp' if self.ramp else ''}"
        if self.kind in RATED:
            return f"{self.kind.value} {self.rate_per_second:g}/s"
        return f"{self.request_count} at once" if self.kind is LoadKind.ALL_AT_ONCE else f"trace x{self.speed:g}"


@dataclass(frozen=True, slots=True, kw_only=True)
class Stage:
    """One load for some time. Requests sent in the measured window count, and the load is kept up until they end."""

    load: Load
    warm_up_seconds: float
    measure_seconds: float


@dataclass(frozen=True, slots=True, kw_only=True)
class ServiceLevel:
    """Limits of the latencies; None: none."""

    ttft_ms: float | None = None
    nttft_ms: float | None = None
    """Per input token."""
    itl_ms: float | None = None
    """Mean of a request's gaps between tokens."""
    tpot_ms: float | None = None
    end_to_end_ms: float | None = None
    share: float = 0.95
    """Share of the requests that must be within all limits; failed ones are not."""


@dataclass(frozen=True, slots=True, kw_only=True)
class LoadSearch:
    """Searches the largest load that meets the service level."""

    kind: LoadKind
    """Users, or arrivals at a rate."""
    low: float
    high: float
    precision: float = 0.05
    """The answer is known up to this share of it; users are whole."""
    confidence: float = 0.95
    warm_up_seconds: float = 5.0
    measure_seconds: float = 30.0


@dataclass(frozen=True, slots=True, kw_only=True)
class WorkloadRequests:
    """Requests drawn by the workload generator."""

    workload_model: str
    """Id of a model or a profile, e.g. "conversation"."""
    seed: int = 0
    conditions: tuple[str, ...] = ()
    value_choice: str = ""
    """centre, uniform or quantiles; empty: the generator's default."""
    independent: bool = False
    scales: tuple[tuple[str, float], ...] = ()
    context_length: int = 0
    """0: no limit."""
    replay: bool = False
    fixed_output_length: bool = True
    tokenizer_json: bytes = field(default=b"", repr=False)
    shared_prefix_ratio: float = 0.0
    prefix_group_count: int = 0
    address: str = ""
    """Of the workload generator; empty: the one of this installation."""


@dataclass(frozen=True, slots=True, kw_only=True)
class PromptRequests:
    """Prompts of the client, sent in order and again from the first when they run out."""

    jsonl: bytes = field(repr=False)
    output_tokens: int = 128
    """Largest reply where a line does not say it."""
    fixed_output_length: bool = True


@dataclass(frozen=True, slots=True, kw_only=True)
class SyntheticRequests:
    """Requests of one length each."""

    input_tokens: int
    output_tokens: int
    seed: int = 0
    fixed_output_length: bool = True


Requests = WorkloadRequests | PromptRequests | SyntheticRequests


@dataclass(frozen=True, slots=True, kw_only=True)
class LoadTestSpec:
    """What a load test does."""

    target: Target
    requests: Requests
    stages: tuple[Stage, ...] = ()
    search: LoadSearch | None = None
    """Instead of stages."""
    service_level: ServiceLevel = ServiceLevel()
    seed: int = 0
    """Of arrival times and intervals."""
    worker_count: int = 0
    """0: as many as CPUs may be used, and the load needs."""
    llm_name: str = ""
    """The LLM under test, for measurements; empty: none is published."""
    gpu_profile: str = ""
    reply_tokenizer_json: bytes = field(default=b"", repr=False)
    """Counts the tokens of replies whose server reports no usage."""


DEFAULT_LADDER = tuple(
    Stage(
        load=Load(kind=LoadKind.USERS, user_steps=(UserStep(at_seconds=0.0, users_count=2**power),)),
        warm_up_seconds=10.0,
        measure_seconds=120.0,
    )
    for power in range(8)
)
"""1, 2, 4 ... 128 users for two minutes each (Lazuka et al., 2024, III-C.3)."""


def stages_of(spec: LoadTestSpec) -> Iterator[Stage]:
    """Yield the stages that are known beforehand: none of a search."""
    if spec.search is None:
        yield from spec.stages or DEFAULT_LADDER
