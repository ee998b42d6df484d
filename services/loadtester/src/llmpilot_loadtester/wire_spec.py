"""Between protobuf and domain: what a load test does.

Invariant: a checked spec can be run; a written one has no key, no header value and nothing large.
"""

from collections.abc import Iterable, Iterator

from llmpilot.loadtest.v1 import loadtest_pb2 as pb
from llmpilot.workload.v1 import workload_pb2
from llmpilot_contracts.errors import Violation
from llmpilot_loadtester.domain import spec as domain
from llmpilot_loadtester.domain.spec_checks import spec_violations
from llmpilot_loadtester.outputs.run_facts import public_url
from llmpilot_loadtester.wire_llm import llm_violations

MODELS = "workloadModels/"

PROTOCOLS = {
    domain.Protocol.OPENAI_COMPLETIONS: pb.PROTOCOL_OPENAI_COMPLETIONS,
    domain.Protocol.OPENAI_CHAT: pb.PROTOCOL_OPENAI_CHAT,
    domain.Protocol.TGI: pb.PROTOCOL_TGI,
    domain.Protocol.TGIS: pb.PROTOCOL_TGIS,
}
LOAD_KINDS = {
    domain.LoadKind.USERS: pb.LOAD_KIND_USERS,
    domain.LoadKind.CONSTANT: pb.LOAD_KIND_CONSTANT,
    domain.LoadKind.POISSON: pb.LOAD_KIND_POISSON,
    domain.LoadKind.GAMMA: pb.LOAD_KIND_GAMMA,
    domain.LoadKind.TRACE: pb.LOAD_KIND_TRACE,
    domain.LoadKind.ALL_AT_ONCE: pb.LOAD_KIND_ALL_AT_ONCE,
}
VALUE_CHOICES = {
    "": workload_pb2.VALUE_CHOICE_UNSPECIFIED,
    "centre": workload_pb2.VALUE_CHOICE_CENTRE,
    "uniform": workload_pb2.VALUE_CHOICE_UNIFORM,
    "quantiles": workload_pb2.VALUE_CHOICE_QUANTILES,
}
_PROTOCOLS_READ = {wire: protocol for protocol, wire in PROTOCOLS.items()}
_LOAD_KINDS_READ = {wire: kind for kind, wire in LOAD_KINDS.items()}
_VALUE_CHOICES_READ = {wire: choice for choice, wire in VALUE_CHOICES.items()}
# What 0 on the wire stands for.
_REQUEST_TIMEOUT_SECONDS, _CONNECT_TIMEOUT_SECONDS = 600.0, 10.0
_OUTPUT_TOKENS = 128
_PRECISION, _CONFIDENCE = 0.05, 0.95
_FOLLOWS = {"spec.requests": "spec.synthetic", "spec.target.protocol": "spec.target.url"}
"""What cannot be judged where another field is wrong; else: its siblings."""
_LIMITS = ("ttft_ms", "nttft_ms", "itl_ms", "tpot_ms", "end_to_end_ms")


def read_spec(
    wire: pb.LoadTestSpec, violations: list[Violation], *, checked: bool = True
) -> domain.LoadTestSpec | None:
    """Return the spec; append what is wrong with it, None where it is not even one.

    Unchecked: as it was written by this service, without prompts.
    """
    found = list(_wire_violations(wire))
    violations += found
    if found and not checked:
        return None
    spec = domain.LoadTestSpec(
        target=_read_target(wire.target),
        requests=_read_requests(wire),
        stages=tuple(map(read_stage, wire.stages)),
        search=_read_search(wire.search) if wire.HasField("search") else None,
        service_level=read_service_level(wire.service_level),
        seed=wire.seed,
        worker_count=wire.worker_count,
        llm_name=wire.llm.name,
        gpu_profile=wire.gpu_profile,
        reply_tokenizer_json=wire.reply_tokenizer_json,
    )
    if checked:
        unknown = tuple(_FOLLOWS.get(each.field, each.field.rpartition(".")[0]) for each in found)
        violations += (each for each in spec_violations(spec) if not each.field.startswith(unknown))
        violations += llm_violations(wire.llm, wire.gpu_profile)
    return None if found else spec


def _wire_violations(wire: pb.LoadTestSpec) -> Iterator[Violation]:
    """Yield what the domain's own words could not say."""
    if wire.target.protocol not in _PROTOCOLS_READ:
        yield Violation("spec.target.protocol", f"must be a known protocol, is {wire.target.protocol}")
    kinds = [(f"spec.stages[{index}].load", stage.load.kind) for index, stage in enumerate(wire.stages)]
    kinds += [("spec.search", wire.search.kind)] * wire.HasField("search")
    for field, kind in kinds:
        if kind not in _LOAD_KINDS_READ:
            yield Violation(f"{field}.kind", f"must be a known kind, is {kind}")
    if len(wire.stages) > domain.LARGEST_STAGE_COUNT:
        yield Violation("spec.stages", f"must be at most {domain.LARGEST_STAGE_COUNT}, are {len(wire.stages)}")
    if wire.WhichOneof("requests") is None:
        yield Violation("spec.requests", "must be set: workload, prompts or synthetic")
    if wire.WhichOneof("requests") == "workload":
        yield from _workload_violations(wire.workload.sampling)
    try:
        wire.target.ca_certificates_pem.decode()
    except UnicodeDecodeError:
        yield Violation("spec.target.ca_certificates_pem", "must be PEM text")


def _workload_violations(sampling: workload_pb2.Sampling) -> Iterator[Violation]:
    field = "spec.workload.sampling"
    name = sampling.workload_model
    if not name.removeprefix(MODELS) or not name.startswith(MODELS):
        yield Violation(f"{field}.workload_model", f'must be like "{MODELS}conversation", is {name[:80]!r}')
    if sampling.value_choice not in _VALUE_CHOICES_READ:
        yield Violation(f"{field}.value_choice", f"must be a known choice, is {sampling.value_choice}")
    if sampling.HasField("arrivals"):
        yield Violation(f"{field}.arrivals", "must not be set: the loads say when requests are sent")


def _read_target(wire: pb.Target) -> domain.Target:
    return domain.Target(
        url=wire.url,
        protocol=_PROTOCOLS_READ.get(wire.protocol, domain.Protocol.OPENAI_COMPLETIONS),
        served_model=wire.served_model,
        api_key=wire.api_key,
        headers=tuple((header.name, header.value) for header in wire.headers),
        ca_certificates_pem=wire.ca_certificates_pem.decode(errors="replace"),
        insecure=wire.insecure,
        request_timeout_seconds=wire.request_timeout_seconds or _REQUEST_TIMEOUT_SECONDS,
        connect_timeout_seconds=wire.connect_timeout_seconds or _CONNECT_TIMEOUT_SECONDS,
    )


def _read_requests(wire: pb.LoadTestSpec) -> domain.Requests:
    match wire.WhichOneof("requests"):
        case "workload":
            return _read_workload(wire.workload)
        case "prompts":
            return domain.PromptRequests(
                jsonl=wire.prompts.jsonl,
                output_tokens=wire.prompts.output_tokens or _OUTPUT_TOKENS,
                fixed_output_length=wire.prompts.fixed_output_length,
            )
    made = wire.synthetic
    return domain.SyntheticRequests(
        input_tokens=made.input_tokens,
        output_tokens=made.output_tokens,
        seed=made.seed,
        fixed_output_length=not made.free_output_length,
    )


def _read_workload(wire: pb.WorkloadRequests) -> domain.WorkloadRequests:
    sampling = wire.sampling
    return domain.WorkloadRequests(
        workload_model=sampling.workload_model.removeprefix(MODELS),
        seed=sampling.seed,
        conditions=tuple(sampling.conditions),
        value_choice=_VALUE_CHOICES_READ.get(sampling.value_choice, ""),
        independent=sampling.independent,
        scales=tuple((scale.parameter, scale.factor) for scale in sampling.scales),
        context_length=sampling.context_length,
        replay=sampling.replay,
        fixed_output_length=wire.fixed_output_length,
        tokenizer_json=wire.tokenizer_json,
        shared_prefix_ratio=wire.shared_prefix_ratio,
        prefix_group_count=wire.prefix_group_count,
        address=wire.address,
    )


def read_stage(wire: pb.Stage) -> domain.Stage:
    """Return a stage; one whose kind of load is unknown as one of users."""
    load = wire.load
    kind = _LOAD_KINDS_READ.get(load.kind, domain.LoadKind.USERS)
    steps = (domain.UserStep(at_seconds=step.at_seconds, users_count=step.users_count) for step in load.user_steps)
    return domain.Stage(
        load=domain.Load(
            kind=kind,
            user_steps=tuple(steps),
            ramp=load.ramp,
            rate_per_second=load.rate_per_second,
            burstiness=load.burstiness if kind is domain.LoadKind.GAMMA else load.burstiness or 1.0,
            speed=load.speed or 1.0,
            request_count=load.request_count,
        ),
        warm_up_seconds=wire.warm_up_seconds,
        measure_seconds=wire.measure_seconds,
    )


def _read_search(wire: pb.LoadSearch) -> domain.LoadSearch:
    return domain.LoadSearch(
        kind=_LOAD_KINDS_READ.get(wire.kind, domain.LoadKind.USERS),
        low=wire.low,
        high=wire.high,
        precision=wire.precision or _PRECISION,
        confidence=wire.confidence or _CONFIDENCE,
        warm_up_seconds=wire.warm_up_seconds,
        measure_seconds=wire.measure_seconds,
    )


def read_service_level(wire: pb.ServiceLevel) -> domain.ServiceLevel:
    """Return limits as they were sent."""
    limits = {name: getattr(wire, name) for name in _LIMITS if wire.HasField(name)}  # type: ignore[arg-type]
    share = wire.share if wire.HasField("share") else domain.ServiceLevel().share
    return domain.ServiceLevel(**limits, share=share)


def write_spec(spec: domain.LoadTestSpec) -> pb.LoadTestSpec:
    """Return what may be shown of a spec, and is small."""
    wire = pb.LoadTestSpec(
        target=_write_target(spec.target),
        stages=map(write_stage, spec.stages),
        service_level=write_service_level(spec.service_level),
        seed=spec.seed,
        worker_count=spec.worker_count,
        gpu_profile=spec.gpu_profile,
    )
    if spec.llm_name:
        wire.llm.name = spec.llm_name
    if spec.search is not None:
        wire.search.CopyFrom(_write_search(spec.search))
    match spec.requests:
        case domain.WorkloadRequests() as requests:
            wire.workload.CopyFrom(_write_workload(requests))
        case domain.PromptRequests() as requests:
            wire.prompts.output_tokens = requests.output_tokens
            wire.prompts.fixed_output_length = requests.fixed_output_length
            wire.prompts.SetInParent()
        case domain.SyntheticRequests() as requests:
            wire.synthetic.input_tokens = requests.input_tokens
            wire.synthetic.output_tokens = requests.output_tokens
            wire.synthetic.seed = requests.seed
            wire.synthetic.free_output_length = not requests.fixed_output_length
    return wire


def _write_target(target: domain.Target) -> pb.Target:
    return pb.Target(
        url=public_url(target.url),
        protocol=PROTOCOLS[target.protocol],
        served_model=target.served_model,
        headers=[pb.Header(name=name) for name, _ in target.headers],
        insecure=target.insecure,
        request_timeout_seconds=target.request_timeout_seconds,
        connect_timeout_seconds=target.connect_timeout_seconds,
    )


def _write_workload(requests: domain.WorkloadRequests) -> pb.WorkloadRequests:
    return pb.WorkloadRequests(
        sampling=workload_pb2.Sampling(
            workload_model=f"{MODELS}{requests.workload_model}",
            seed=requests.seed,
            conditions=requests.conditions,
            value_choice=VALUE_CHOICES[requests.value_choice],
            independent=requests.independent,
            scales=_write_scales(requests.scales),
            context_length=requests.context_length,
            replay=requests.replay,
        ),
        fixed_output_length=requests.fixed_output_length,
        shared_prefix_ratio=requests.shared_prefix_ratio,
        prefix_group_count=requests.prefix_group_count,
        address=requests.address,
    )


def _write_scales(scales: Iterable[tuple[str, float]]) -> list[workload_pb2.Scale]:
    return [workload_pb2.Scale(parameter=parameter, factor=factor) for parameter, factor in scales]


def write_stage(stage: domain.Stage) -> pb.Stage:
    """Return a stage for the wire."""
    load = stage.load
    return pb.Stage(
        load=pb.Load(
            kind=LOAD_KINDS[load.kind],
            user_steps=[
                pb.UserStep(at_seconds=step.at_seconds, users_count=step.users_count) for step in load.user_steps
            ],
            ramp=load.ramp,
            rate_per_second=load.rate_per_second,
            burstiness=load.burstiness,
            speed=load.speed,
            request_count=load.request_count,
        ),
        warm_up_seconds=stage.warm_up_seconds,
        measure_seconds=stage.measure_seconds,
    )


def _write_search(search: domain.LoadSearch) -> pb.LoadSearch:
    return pb.LoadSearch(
        kind=LOAD_KINDS[search.kind],
        low=search.low,
        high=search.high,
        precision=search.precision,
        confidence=search.confidence,
        warm_up_seconds=search.warm_up_seconds,
        measure_seconds=search.measure_seconds,
    )


def write_service_level(service_level: domain.ServiceLevel) -> pb.ServiceLevel:
    """Return limits for the wire."""
    return pb.ServiceLevel(
        **{name: getattr(service_level, name) for name in _LIMITS},
        share=service_level.share,
    )
