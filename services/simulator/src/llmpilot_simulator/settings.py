"""What a simulated server is told.

Invariant: settings that contradict themselves are refused before anything listens, all of them at once.
"""

from dataclasses import dataclass, field
from pathlib import Path

from llmpilot_contracts.errors import InvalidInputError, Violation
from llmpilot_perfmodel.batching.policies import Policy
from llmpilot_perfmodel.steps.step_time import StepTables
from llmpilot_servicekit.address import split_address
from llmpilot_simulator.faults import ServerFaults
from llmpilot_simulator.generation import ReplyLengths


@dataclass(frozen=True, slots=True, kw_only=True)
class ModelledTimes:
    """Tokens leave as a server with this policy and these step times would send them."""

    policy: Policy
    tables: StepTables
    out_of_memory_tokens: int | None = None
    """A step whose batch holds more tokens fails; None: never."""
    frontend_seconds_per_token: float = 0.0
    """What the API server takes for each token, one after the other; 0: the tokens of a step leave at once."""


@dataclass(frozen=True, slots=True, kw_only=True)
class FixedTimes:
    """Tokens leave at times that are known beforehand: a golden server for load testers."""

    ttft_seconds: float
    itl_seconds: float


Times = ModelledTimes | FixedTimes


@dataclass(frozen=True, slots=True, kw_only=True)
class SimulatorSettings:
    """One server."""

    model_id: str
    """Without the suffix that marks it as simulated."""
    context_length: int
    """Tokens of prompt and reply together."""
    times: Times
    is_encoder_decoder: bool = False
    """Whether the LLM encodes the prompt first."""
    http_address: str = "127.0.0.1:8000"
    """Port 0: any free one."""
    grpc_address: str | None = "127.0.0.1:8033"
    """Of TGIS; None: not served."""
    reply_lengths: ReplyLengths = field(default_factory=ReplyLengths)
    """How long replies are when the request does not say."""
    seed: int = 0
    """Of the replies whose requests have none."""
    faults: ServerFaults = field(default_factory=ServerFaults)
    write_log: Path | None = None
    """A file for the true write time of every token; None: not kept."""
    slow_reader_seconds: float = 60.0
    """How long a client may not read its stream before its connection is closed."""
    shutdown_grace_seconds: float = 5.0
    """How long streams may go on after the order to stop."""

    def __post_init__(self) -> None:
        violations = [
            Violation(name, f"must be from 0 to {_LONGEST_SECONDS:g}, is {value}")
            for name, value in self._durations()
            if not 0 <= value <= _LONGEST_SECONDS
        ]
        for name, address in (("http_address", self.http_address), ("grpc_address", self.grpc_address)):
            try:
                split_address(address or _ANY_ADDRESS)
            except ValueError as error:
                violations.append(Violation(name, f"{error}, is {address!r}"))
        if not self.model_id:
            violations.append(Violation("model_id", "must not be empty"))
        if self.context_length < _LEAST_CONTEXT:
            violations.append(Violation("context_length", f"must be >= {_LEAST_CONTEXT}, is {self.context_length}"))
        if violations:
            raise InvalidInputError(violations)

    def _durations(self) -> list[tuple[str, float]]:
        durations = [
            ("slow_reader_seconds", self.slow_reader_seconds),
            ("shutdown_grace_seconds", self.shutdown_grace_seconds),
        ]
        match self.times:
            case ModelledTimes(frontend_seconds_per_token=seconds):
                return [*durations, ("frontend_seconds_per_token", seconds)]
            case FixedTimes(ttft_seconds=ttft, itl_seconds=itl):
                return [*durations, ("ttft_seconds", ttft), ("itl_seconds", itl)]


_LEAST_CONTEXT = 2
"""One token of prompt, one of reply."""
_LONGEST_SECONDS = 1e6

_ANY_ADDRESS = "127.0.0.1:0"
