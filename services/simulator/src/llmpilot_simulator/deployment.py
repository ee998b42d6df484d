"""An LLM on a GPU profile under a scheduling policy: everything that a simulation of it needs, with its reasons.

Invariant: a deployment fits into its memory, or is told to run out of it as a real one would.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from llmpilot_contracts.errors import InvalidInputError, NotFoundError, PreconditionError, Violation
from llmpilot_perfmodel.batching.policies import (
    TGIS_BATCH_SIZE,
    Policy,
    TgiPolicy,
    TgisPolicy,
    Vllm0Policy,
    Vllm1Policy,
    WeightDefinition,
)
from llmpilot_perfmodel.bundled_llms import bundled_config, find_bundled
from llmpilot_perfmodel.gpu_catalogue import GpuProfile, load_catalogue
from llmpilot_perfmodel.llm_config import LlmConfig, parse_llm
from llmpilot_perfmodel.memory_budget import (
    LARGEST_INPUT_TOKENS,
    LARGEST_OUTPUT_TOKENS,
    VLLM_0_2,
    MemoryBudget,
    PagedServer,
    memory_budget,
)
from llmpilot_perfmodel.precision import Precision, precision_named
from llmpilot_perfmodel.sizes import LlmWork, llm_work
from llmpilot_perfmodel.steps.fitted import fitted_constants
from llmpilot_perfmodel.steps.roofline import roofline_constants
from llmpilot_perfmodel.steps.step_time import StepConstants

FITTED_BITS = 16
"""Of the weights in the load tests that step times were calibrated on."""
DEFAULT_CONTEXT_LENGTH = 2048
"""Of an LLM whose config.json states none."""
COMPILING = "compiling the simulation for this machine; only the first run after an installation does"
BLOCK_SIZE = 16
VLLM0_BATCHED_TOKENS = 2560
"""vLLM 0.2's default of max_num_batched_tokens, which it raises to the context length."""

_BuildPolicy = Callable[[int, LlmWork, int], Policy]


def _tgis(weight: int, work: LlmWork, context_length: int) -> Policy:  # noqa: ARG001 one signature for all
    return TgisPolicy(max_batch_weight=weight, is_padded=work.is_padded)


def _tgi(weight: int, work: LlmWork, context_length: int) -> Policy:  # noqa: ARG001
    return TgiPolicy(max_batch_total_tokens=weight, max_batch_prefill_tokens=min(max(4096, context_length), weight))


def _vllm0(weight: int, work: LlmWork, context_length: int) -> Policy:  # noqa: ARG001
    batched = max(VLLM0_BATCHED_TOKENS, context_length)
    return Vllm0Policy(block_count=weight // BLOCK_SIZE, block_size=BLOCK_SIZE, max_num_batched_tokens=batched)


def _vllm1(weight: int, work: LlmWork, context_length: int) -> Policy:  # noqa: ARG001
    return Vllm1Policy(block_count=weight // BLOCK_SIZE, block_size=BLOCK_SIZE)


@dataclass(frozen=True, slots=True, kw_only=True)
class _Server:
    build: _BuildPolicy
    paged: PagedServer | None
    """None: its cache has no pages."""


_SERVERS = {
    "tgis": _Server(build=_tgis, paged=None),
    "tgi": _Server(build=_tgi, paged=PagedServer()),
    "vllm-0.2": _Server(build=_vllm0, paged=VLLM_0_2),
    "vllm": _Server(build=_vllm1, paged=PagedServer()),
}
POLICY_NAMES = tuple(_SERVERS)


_UNITS = {WeightDefinition.TOKENS: "tokens", WeightDefinition.PADDED_SQUARED: "requests x longest^2 tokens"}


@dataclass(frozen=True, slots=True, kw_only=True)
class Deployment:
    """One pod."""

    llm_name: str
    profile: GpuProfile
    policy_name: str
    policy: Policy
    batch_weight: int
    """What the batch may weigh."""
    weight_definition: WeightDefinition
    step_constants: StepConstants
    step_source: str
    """Where those come from, in a sentence."""
    out_of_memory_tokens: int | None
    """Tokens in the batch at which a step fails; None: none is expected to."""
    budget: MemoryBudget
    context_length: int
    is_encoder_decoder: bool

    @property
    def name(self) -> str:
        """What a legend shows."""
        return f"{self.llm_name} on {self.profile.name}"

    @property
    def safe_batch_weight(self) -> int:
        """The largest with which it has never run out of memory."""
        return _weight_within(self.weight_definition, self.budget.safe_batch_weight)

    def notes(self, *, explain: bool) -> tuple[str, ...]:
        """Return what somebody has to know who reads the numbers; explain: also where the memory goes."""
        weight = f"maximum batch weight {self.batch_weight:,} {_UNITS[self.weight_definition]}"
        if self.out_of_memory_tokens is not None:
            weight += (
                f", more than the {self.safe_batch_weight:,} that are safe: "
                f"out of memory beyond {self.out_of_memory_tokens:,} tokens"
            )
        return (weight, f"step times: {self.step_source}", *(self.budget.explain() if explain else ()))


@dataclass(frozen=True, slots=True, kw_only=True)
class DeploymentRequest:
    """What somebody wants simulated; None: what a careful operator would choose."""

    llm: str
    """Name of a bundled LLM, path of a config.json, or of the folder that holds one."""
    gpu_profile: str | None
    policy: str = "tgis"
    max_batch_weight: int | None = None
    """Tokens: the maximum batch weight of TGIS, max_batch_total_tokens of TGI, blocks times block size of vLLM; of TGIS
    without flash attention requests times the square of the longest one's tokens."""
    precision: str | None = None
    context_length: int | None = None
    gpus: Path | None = None
    """A CSV file of GPU types to add to the catalogue."""


def deploy(request: DeploymentRequest) -> Deployment:
    """Return the pod; raises InvalidInputError, NotFoundError, and PreconditionError where it does not fit."""
    name, config = read_llm(request.llm)
    precision = precision_named(request.precision) if request.precision else config.precision
    profile = load_catalogue(request.gpus).require(request.gpu_profile or "")
    server = _server(request.policy)
    work = llm_work(config, profile.gpu_count, precision)
    budget = memory_budget(work, profile, paged=server.paged)
    is_squared = request.policy == "tgis" and work.is_padded
    definition = WeightDefinition.PADDED_SQUARED if is_squared else WeightDefinition.TOKENS
    weight = _batch_weight(request, budget, definition)
    context_length = context_length_of(request, config)
    step_constants, step_source = _step_constants(name, config, work, profile, precision)
    is_risky = _most_tokens(definition, weight) > budget.largest_batch_weight
    return Deployment(
        llm_name=name,
        profile=profile,
        policy_name=request.policy,
        policy=server.build(weight, work, context_length),
        batch_weight=weight,
        weight_definition=definition,
        step_constants=step_constants,
        step_source=step_source,
        out_of_memory_tokens=budget.out_of_memory_tokens if is_risky else None,
        budget=budget,
        context_length=context_length,
        is_encoder_decoder=config.spec.is_encoder_decoder,
    )


def _step_constants(
    name: str, config: LlmConfig, work: LlmWork, profile: GpuProfile, precision: Precision
) -> tuple[StepConstants, str]:
    if precision.weight_bits == FITTED_BITS:
        try:
            fitted = fitted_constants(name, profile.name, config.spec)
        except NotFoundError:
            pass
        else:
            load = f"{fitted.llm} under {fitted.users[0]} to {fitted.users[-1]} users"
            return fitted.constants, f"calibrated on public load tests of {load}, decode +-{fitted.decode_error:.0%}"
    doubt = "; without flash attention a fifth off on average" if work.is_padded else ""
    if work.experts is not None:
        doubt += "; too fast for large batches, as decodes count the experts of one token"
    return roofline_constants(work, profile), f"roofline, as nobody has measured this LLM on {profile.name}{doubt}"


def read_llm(llm: str) -> tuple[str, LlmConfig]:
    """Return name and config of a bundled LLM or of a config.json; raises InvalidInputError, NotFoundError."""
    path = Path(llm)
    if path.is_dir():
        path /= "config.json"
    if path.suffix != ".json" and not path.is_file():
        bundled = find_bundled(llm)
        return (bundled.name if bundled else llm), parse_llm(bundled_config(llm))
    try:
        text = path.read_text(encoding="utf-8")
    except FileNotFoundError as error:
        raise NotFoundError("config.json", str(path)) from error
    except OSError as error:
        raise InvalidInputError([Violation("--llm", f"{path} cannot be read: {error.strerror}")]) from error
    except UnicodeDecodeError as error:
        raise InvalidInputError([Violation("--llm", f"{path} must be text in UTF-8")]) from error
    return path.resolve().parent.name, parse_llm(text)


def context_length_of(request: DeploymentRequest, config: LlmConfig) -> int:
    """Return the context length that is asked for, else that of the config.json, else 2,048."""
    if request.context_length is not None:
        return request.context_length
    return config.spec.max_position_count or DEFAULT_CONTEXT_LENGTH


def _server(policy: str) -> _Server:
    if policy not in _SERVERS:
        raise InvalidInputError(
            [Violation("--policy", f"must be one of {', '.join(POLICY_NAMES)}, is {policy[:40]!r}")]
        )
    return _SERVERS[policy]


def _batch_weight(request: DeploymentRequest, budget: MemoryBudget, definition: WeightDefinition) -> int:
    if not budget.fits:
        reasons = "\n".join(budget.explain())
        raise PreconditionError(
            f"{request.llm} does not fit on {request.gpu_profile}; take more or larger GPUs or a smaller --precision\n"
            f"{reasons}"
        )
    if request.max_batch_weight is not None:
        try:
            budget.require_batch_weight(_most_tokens(definition, request.max_batch_weight))
        except PreconditionError as error:
            given = f"{request.max_batch_weight:,} {_UNITS[definition]}"
            raise PreconditionError(f"--max-batch-weight {given}: {error}") from error
        return request.max_batch_weight
    return max(
        _weight_within(definition, budget.safe_batch_weight),
        definition.weight(1, LARGEST_INPUT_TOKENS + LARGEST_OUTPUT_TOKENS),
    )


def _weight_within(definition: WeightDefinition, tokens: int) -> int:
    """Return the largest weight with which no batch holds more tokens: where it pads, many short requests do."""
    return tokens if definition is WeightDefinition.TOKENS else tokens**2 // TGIS_BATCH_SIZE


def _most_tokens(definition: WeightDefinition, weight: int) -> int:
    """Return the most tokens that a batch of this weight holds."""
    return weight if definition is WeightDefinition.TOKENS else math.isqrt(max(weight, 0) * TGIS_BATCH_SIZE)
