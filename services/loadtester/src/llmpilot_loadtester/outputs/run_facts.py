"""What is known of a load test besides its records: where it went, what it sent, what each stage was.

Invariant: no key, no header value and no password of the target's address gets in, so that files made of it can be
given away.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from urllib.parse import urlsplit, urlunsplit

from llmpilot_loadtester.domain.results import Verdict
from llmpilot_loadtester.domain.spec import (
    LoadTestSpec,
    PromptRequests,
    Requests,
    ServiceLevel,
    Stage,
    SyntheticRequests,
)
from llmpilot_loadtester.domain.window import Window, window_of


@dataclass(frozen=True, slots=True, kw_only=True)
class StageFacts:
    """One run of one stage."""

    stage_index: int
    stage: Stage
    start_unix_nanos: int
    """Time 0 of its records."""
    verdict: Verdict
    attempt: int = 1
    llm: str = ""
    """As the catalogue has it; empty: not said."""
    gpu_profile: str = ""
    request_count: int = 0
    """Records, warm-up and cool-down included."""

    @property
    def window(self) -> Window:
        """The measured window, since time 0."""
        return window_of(self.stage)

    @property
    def label(self) -> str:
        """A few words for people: the load, and which attempt if it is not the first."""
        return self.stage.load.label + (f", attempt {self.attempt}" if self.attempt > 1 else "")


@dataclass(frozen=True, slots=True, kw_only=True)
class RunFacts:
    """A whole load test."""

    name: str = ""
    """loadTests/{id}; empty: none."""
    target_url: str = ""
    """Without user and password."""
    protocol: str = ""
    served_model: str = ""
    simulated: bool = False
    """Whether the server said of itself that it is a simulator."""
    requests: str = ""
    """What was sent, in words."""
    seed: int = 0
    service_level: ServiceLevel = field(default_factory=ServiceLevel)
    tool_version: str = ""
    created_unix_nanos: int = 0
    notes: tuple[str, ...] = ()
    """What a reader should know."""
    stages: tuple[StageFacts, ...] = ()
    """By the order of their row groups."""


def facts_of_spec(
    spec: LoadTestSpec,
    *,
    tool_version: str,
    created_unix_nanos: int,
    name: str = "",
    served_model: str = "",
    simulated: bool = False,
) -> RunFacts:
    """Return what a spec says of its load test, without stages."""
    return RunFacts(
        name=name,
        target_url=public_url(spec.target.url),
        protocol=spec.target.protocol.value,
        served_model=served_model or spec.target.served_model,
        simulated=simulated,
        requests=words_of(spec.requests),
        seed=spec.seed,
        service_level=spec.service_level,
        tool_version=tool_version,
        created_unix_nanos=created_unix_nanos,
    )


def public_url(url: str) -> str:
    """Return an address without user, password, query and fragment: each may be a secret."""
    parts = urlsplit(url)
    return urlunsplit((parts.scheme, parts.netloc.rpartition("@")[2], parts.path, "", ""))


def words_of(requests: Requests) -> str:
    """Say what is sent."""
    if isinstance(requests, SyntheticRequests):
        return f"synthetic: {requests.input_tokens} tokens in, {requests.output_tokens} out; seed {requests.seed}"
    if isinstance(requests, PromptRequests):
        return f"prompts of a file, replies of up to {requests.output_tokens} tokens where a line does not say it"
    words = [f"workload {requests.workload_model}, seed {requests.seed}"]
    words += [f"given {condition}" for condition in requests.conditions]
    words += [f"{name} x {factor:g}" for name, factor in requests.scales]
    words += ["parameters independent"] * requests.independent + ["replayed in order"] * requests.replay
    if requests.shared_prefix_ratio:
        words.append(f"{requests.shared_prefix_ratio:.0%} of a prompt shared in {requests.prefix_group_count} groups")
    if requests.context_length:
        words.append(f"at most {requests.context_length} tokens")
    return ", ".join([*words, "replies of the drawn length" if requests.fixed_output_length else "replies end freely"])


def newest_attempts(stages: Sequence[StageFacts]) -> tuple[StageFacts, ...]:
    """Return the last attempt at each stage of each LLM and GPU profile, by stage."""
    newest: dict[tuple[str, str, int], StageFacts] = {}
    for facts in stages:
        key = (facts.llm, facts.gpu_profile, facts.stage_index)
        if key not in newest or facts.attempt > newest[key].attempt:
            newest[key] = facts
    return tuple(newest[key] for key in sorted(newest))


def with_service_level(facts: RunFacts, service_level: ServiceLevel | None) -> RunFacts:
    """Return the facts with other limits; None: with their own."""
    return facts if service_level is None else replace(facts, service_level=service_level)
