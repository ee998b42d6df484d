"""What a specification comes to: the LLM, the limits, how batches are executed, what they are predicted to need.

Invariant: a plan is only made of a specification without violations, whose weights fit into the GPUs.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace

from llmpilot_contracts.errors import InvalidInputError, PreconditionError, Violation
from llmpilot_perfmodel.architecture import T5Architecture
from llmpilot_perfmodel.llm_config import LlmConfig, parse_llm
from llmpilot_perfmodel.precision import PRECISIONS, Precision
from llmpilot_perfmodel.sizes import llm_work
from llmpilot_perfmodel.step_memory.batch import Attention, Batch, Execution
from llmpilot_perfmodel.step_memory.moment import Amount, Floats
from llmpilot_perfmodel.step_memory.peak import StepMemoryModel
from llmpilot_tuner.domain.corners import corner_batches
from llmpilot_tuner.domain.limits import Limits
from llmpilot_tuner.domain.probing import ProbeKind
from llmpilot_tuner.domain.search import Problem, largest_weight
from llmpilot_tuner.domain.servers import Server, server_rules
from llmpilot_tuner.domain.spec import TuningSpec

RUN_PRECISIONS = {"fp32": "float32", "fp16": "float16", "bf16": "bfloat16"}
"""What a probe that runs the LLM can run."""
_GPU_COUNTS = (1, 2, 4, 8, 16, 32, 64)
_GIB = 2**30
_LARGEST_SOAK = 100_000


@dataclass(frozen=True, slots=True, kw_only=True)
class Prediction:
    """The peak of a batch by the formulas of `libs/perfmodel`, on one of so many GPUs."""

    model: StepMemoryModel
    weight_bytes: float

    def __call__(self, batch: Batch) -> float:
        """Return the bytes of a batch at its peak, weights included."""
        memory = self.model.of(batch)
        return self.weight_bytes + memory.cache_bytes + memory.working_bytes

    def prefill_bytes(
        self, requests: Amount, lengths: Amount, residents: Sequence[tuple[Amount, Amount]], *, all_logits: bool = False
    ) -> Floats:
        """Return what each of many padded prefills takes beside the weights; see `StepMemoryModel`."""
        return self.model.prefill_bytes(requests, lengths, residents, all_logits=all_logits)

    def decode_bytes(self, requests: Amount, inputs: Amount, outputs: Amount) -> Floats:
        """Return what each of many padded decode steps takes beside the weights; see `StepMemoryModel`."""
        return self.model.decode_bytes(requests, inputs, outputs)


@dataclass(frozen=True, slots=True, kw_only=True)
class Plan:
    """A specification, ready to be run."""

    spec: TuningSpec
    config: LlmConfig
    limits: Limits
    execution: Execution
    precision: Precision
    predict: Prediction

    @property
    def problem(self) -> Problem:
        """What is searched."""
        return problem_of(self.spec, self.limits, self.predict)


def problem_of(spec: TuningSpec, limits: Limits, predict: Prediction) -> Problem:
    """Return what is searched under some limits."""
    granule = spec.granule
    return Problem(
        lowest=-(-limits.lowest_weight // granule) * granule,
        highest=-(-limits.highest_weight // granule) * granule,
        granule=granule,
        precision=spec.precision,
        capacity_bytes=spec.capacity_bytes,
        cases=lambda weight: corner_batches(limits, weight, predict),
        predict=predict,
        weight_bytes=predict.weight_bytes,
    )


def predicted_weight(problem: Problem) -> int | None:
    """Return the largest weight that the formulas allow; None: not even the lowest."""
    predict = problem.predict
    if predict is None:
        return None
    return largest_weight(
        problem,
        problem.highest,
        lambda weight: all(predict(batch) <= problem.capacity_bytes for batch in problem.cases(weight)),
    )


def half_sequence_weight(plan: Plan) -> int | None:
    """Return what the formulas allow for requests of half the length; None: nothing, or they cannot be halved."""
    half = plan.limits.longest_sequence // 2
    most_new_tokens = max(1, min(plan.limits.most_new_tokens // 2, half - 1))
    limits = replace(plan.limits, longest_sequence=half, most_new_tokens=most_new_tokens)
    if limits.violations():
        return None
    return predicted_weight(problem_of(plan.spec, limits, plan.predict))


def plan_of(spec: TuningSpec) -> Plan:
    """Return what a specification comes to.

    Raises InvalidInputError with everything that is wrong, and PreconditionError where the weights are larger than
    the GPUs: by how much, and how many GPUs would do.
    """
    violations = _violations(spec)
    config: LlmConfig | None = None
    try:
        config = parse_llm(spec.config_json)
    except InvalidInputError as error:
        violations += error.violations
    if config is None:
        raise InvalidInputError(violations)
    precision = _precision(spec, config, violations)
    limits = _limits(spec, config)
    violations += limits.violations()
    violations += _llm_violations(spec, config)
    if spec.gpu_count >= 1:
        violations += _sharding_violations(config, spec.gpu_count, precision)
    if violations:
        raise InvalidInputError(violations)
    plan = _plan(spec, _as_served(config, precision), precision, limits)
    _require_weights_fit(plan)
    return plan


def _as_served(config: LlmConfig, precision: Precision) -> LlmConfig:
    """Return an LLM whose data type is that of its precision: T5's weights are larger in fp16 than in bf16."""
    dtype = RUN_PRECISIONS.get(precision.name, config.spec.torch_dtype)
    return replace(config, spec=replace(config.spec, torch_dtype=dtype))


def _plan(spec: TuningSpec, config: LlmConfig, precision: Precision, limits: Limits) -> Plan:
    execution = Execution(
        layout=limits.rules.layout,
        attention=Attention.EAGER if spec.eager_attention else Attention.FUSED,
        gpu_count=spec.gpu_count,
        activation_bits=precision.activation_bits,
    )
    return Plan(
        spec=spec,
        config=config,
        limits=limits,
        execution=execution,
        precision=precision,
        predict=prediction(config, execution, precision),
    )


def prediction(config: LlmConfig, execution: Execution, precision: Precision) -> Prediction:
    """Return what an LLM needs by the formulas, with weights in some precision."""
    return Prediction(
        model=StepMemoryModel(config, execution),
        weight_bytes=served_weight_bytes(config, execution.gpu_count, precision),
    )


def served_weight_bytes(config: LlmConfig, gpu_count: int, precision: Precision) -> float:
    """Return what weights take of each GPU; in fp16 T5's second feed-forward matrices stay in 32 bits, or overflow."""
    work = llm_work(config, gpu_count, precision)
    return work.weight_bytes + (2 * work.fp32_parameter_count if precision.name == "fp16" else 0)


def smallest_gpu_count(plan: Plan) -> int | None:
    """Return the fewest GPUs, more than the plan's, on which one longest request fits; None: no number of them."""
    for count in _GPU_COUNTS:
        spec = replace(plan.spec, gpu_count=count)
        if count <= plan.spec.gpu_count or _sharding_violations(plan.config, count, plan.precision):
            continue
        sharded = _plan(spec, plan.config, plan.precision, plan.limits)
        if sharded.predict.weight_bytes < spec.capacity_bytes and predicted_weight(sharded.problem) is not None:
            return count
    return None


def _require_weights_fit(plan: Plan) -> None:
    """Raise PreconditionError where the weights alone are larger than a GPU."""
    spec, weights = plan.spec, plan.predict.weight_bytes
    if weights < spec.capacity_bytes:
        return
    enough = smallest_gpu_count(plan)
    advice = (
        f"the smallest tensor parallelism that fits is {enough} such GPUs"
        if enough
        else "no number of such GPUs that divides its heads is enough; take GPUs with more memory"
    )
    raise PreconditionError(
        f"the {plan.precision.name} weights take {_gib(weights)} of each of {spec.gpu_count} GPU(s), which has "
        f"{_gib(spec.capacity_bytes)} for them: {_gib(weights - spec.capacity_bytes)} too little; {advice}"
    )


def _violations(spec: TuningSpec) -> list[Violation]:
    found = []
    if spec.gpu_memory_bytes < 1:
        found.append(Violation("gpu_memory_bytes", f"must be >= 1, is {spec.gpu_memory_bytes}"))
    elif not 0 <= spec.reserved_bytes < spec.gpu_memory_bytes:
        found.append(
            Violation(
                "reserved_bytes",
                f"must be >= 0 and less than the GPU's {spec.gpu_memory_bytes} bytes, is {spec.reserved_bytes}",
            )
        )
    for name, value in (("gpu_count", spec.gpu_count), ("granule", spec.granule)):
        if value < 1:
            found.append(Violation(name, f"must be >= 1, is {value}"))
    if not 0 <= spec.precision < 1:
        found.append(Violation("precision", f"must be >= 0 and < 1, a share of the weight, is {spec.precision}"))
    if not 0 < spec.step_seconds < float("inf"):
        found.append(Violation("step_seconds", f"must be > 0, is {spec.step_seconds}"))
    if not 0 <= spec.soak_steps <= _LARGEST_SOAK:
        found.append(Violation("soak_steps", f"must be >= 0 and <= {_LARGEST_SOAK}, is {spec.soak_steps}"))
    if spec.probe is ProbeKind.SERVER and spec.target is None:
        found.append(Violation("target", "is missing: a server probe needs the address of a server"))
    if spec.model_folder is not None and not spec.model_folder.is_dir():
        found.append(Violation("model_folder", f"{spec.model_folder} is no folder; it needs config.json and weights"))
    return found


def _llm_violations(spec: TuningSpec, config: LlmConfig) -> list[Violation]:
    found = []
    # Positions of a T5 are relative, and have no end.
    context = None if isinstance(config.architecture, T5Architecture) else config.spec.max_position_count
    if context is not None and spec.longest_sequence > context:
        found.append(
            Violation("longest_sequence", f"must be <= {context}, the LLM's context, is {spec.longest_sequence}")
        )
    if spec.eager_attention and spec.server is Server.VLLM:
        found.append(Violation("eager_attention", "is nothing that vllm has: it brings attention kernels of its own"))
    return found


def _precision(spec: TuningSpec, config: LlmConfig, violations: list[Violation]) -> Precision:
    if spec.precision_name and spec.precision_name not in PRECISIONS:
        violations.append(
            Violation("precision_name", f"must be one of {', '.join(PRECISIONS)}, is {spec.precision_name[:40]!r}")
        )
        return PRECISIONS["fp16"]
    if spec.precision_name:
        precision = PRECISIONS[spec.precision_name]
    else:
        violations += config.stated_precision.violations
        precision = config.stated_precision.precision
    runs_llm = spec.probe in {ProbeKind.DRY, ProbeKind.CPU, ProbeKind.TORCH}
    if runs_llm and precision.name not in RUN_PRECISIONS:
        violations.append(
            Violation(
                "precision_name",
                f"{precision.name} weights cannot be run by a {spec.probe} probe: use the analytic or the server "
                f"probe, or one of {', '.join(RUN_PRECISIONS)}",
            )
        )
    return precision


def _sharding_violations(config: LlmConfig, gpu_count: int, precision: Precision) -> tuple[Violation, ...]:
    try:
        llm_work(config, gpu_count, precision)
    except InvalidInputError as error:
        return error.violations
    return ()


def _limits(spec: TuningSpec, config: LlmConfig) -> Limits:
    is_encoder_decoder = isinstance(config.architecture, T5Architecture)
    is_padded = is_encoder_decoder or spec.eager_attention or not config.spec.uses_flash_attention
    rules = server_rules(spec.server, is_padded=is_padded)
    limit = spec.prefill_limit if spec.prefill_limit is not None else rules.default_prefill_limit
    limits = Limits(
        rules=rules,
        longest_sequence=spec.longest_sequence,
        most_new_tokens=spec.most_new_tokens,
        most_requests=spec.most_requests,
        prefill_limit=limit,
        is_encoder_decoder=is_encoder_decoder,
        prompt_logprobs=spec.prompt_logprobs,
    )
    if spec.prefill_limit is None and limit is not None and spec.longest_sequence > 1:
        needed = spec.most_requests if rules.chunks_prefills else limits.prefill_weight(1, limits.longest_input)
        return replace(limits, prefill_limit=max(limit, needed))  # a default is no reason to refuse a longest input
    return limits


def _gib(byte_count: float) -> str:
    return f"{byte_count / _GIB:.2f} GiB"
