"""Between protobuf and domain: what a tuning is asked to do.

Invariant: a spec that was read without violations can be run; `read_spec(write_spec(spec)) == spec`.
"""

from dataclasses import dataclass
from functools import cache
from urllib.parse import urlsplit

from llmpilot.catalog.v1 import llm_pb2
from llmpilot.tuning.v1 import tuning_pb2 as pb
from llmpilot_contracts.errors import InvalidInputError, NotFoundError, Violation
from llmpilot_perfmodel.bundled_llms import bundled_config, find_bundled
from llmpilot_perfmodel.gpu_catalogue import Gpu, GpuCatalogue, load_catalogue
from llmpilot_perfmodel.llm_config import parse_config
from llmpilot_tuner.domain import defaults
from llmpilot_tuner.domain.plan import plan_of
from llmpilot_tuner.domain.probing import ProbeKind
from llmpilot_tuner.domain.servers import Server
from llmpilot_tuner.domain.spec import (
    DEFAULT_PRECISION,
    DEFAULT_SOAK_STEPS,
    DEFAULT_STEP_SECONDS,
    ServerTarget,
    TuningSpec,
)

LARGEST_CONFIG_BYTES = 128 * 1024
"""It is in every snapshot, which is one message on NATS; published ones have a few kB."""
LARGEST_NAME = 200
PROBE_KINDS = {
    ProbeKind.ANALYTIC: pb.PROBE_KIND_ANALYTIC,
    ProbeKind.DRY: pb.PROBE_KIND_DRY,
    ProbeKind.CPU: pb.PROBE_KIND_CPU,
    ProbeKind.TORCH: pb.PROBE_KIND_TORCH,
    ProbeKind.SERVER: pb.PROBE_KIND_SERVER,
}
SERVER_KINDS = {
    Server.TGIS: pb.SERVER_KIND_TGIS,
    Server.TGI: pb.SERVER_KIND_TGI,
    Server.VLLM: pb.SERVER_KIND_VLLM,
}
_PROBE_KINDS_READ = {wire: kind for kind, wire in PROBE_KINDS.items()}
_SERVER_KINDS_READ = {wire: server for server, wire in SERVER_KINDS.items()}
_SCHEMES = {Server.TGIS: ("grpc", "grpcs"), Server.TGI: ("http", "https"), Server.VLLM: ("http", "https")}
_CONFIG = "config_json"
_FIELDS = {"precision": "precision_share", "precision_name": "precision", "limits": ""}
"""What the domain calls fields that have other names on the wire."""


@dataclass(frozen=True, slots=True, kw_only=True)
class _Memory:
    gpu: Gpu | None = None
    gpu_count: int
    byte_count: int


def read_spec(wire: pb.TuningSpec, violations: list[Violation], *, checked: bool = True) -> TuningSpec | None:
    """Return the spec; append everything that is wrong with it, None where it is not even one.

    Unchecked: as this service wrote it. Raises PreconditionError where the LLM is larger than its GPUs.
    """
    found: list[Violation] = []
    probe, server = _read_kinds(wire, found)
    name, config_json = _read_llm(wire.llm, found)
    memory = _read_memory(wire, found)
    longest_sequence = wire.longest_sequence or defaults.default_longest_sequence(_positions(config_json))
    spec = TuningSpec(
        config_json=config_json,
        llm_name=name,
        probe=probe,
        server=server,
        gpu_name=memory.gpu.name if memory.gpu else "",
        gpu_count=memory.gpu_count,
        gpu_memory_bytes=memory.byte_count,
        reserved_bytes=_reserved_bytes(wire, probe, memory),
        precision_name=wire.precision,
        eager_attention=wire.eager_attention,
        longest_sequence=longest_sequence,
        most_new_tokens=wire.most_new_tokens or defaults.default_most_new_tokens(longest_sequence),
        most_requests=wire.most_requests or defaults.DEFAULT_MOST_REQUESTS,
        prefill_limit=wire.prefill_limit or None,
        prompt_logprobs=wire.prompt_logprobs,
        granule=wire.granule or defaults.DEFAULT_GRANULE,
        precision=wire.precision_share if wire.HasField("precision_share") else DEFAULT_PRECISION,
        step_seconds=wire.step_seconds or DEFAULT_STEP_SECONDS,
        soak_steps=wire.soak_steps if wire.HasField("soak_steps") else DEFAULT_SOAK_STEPS,
        seed=wire.seed,
        target=_read_target(wire, probe, server, found),
    )
    if checked:
        known = {each.field for each in found}
        violations += (each for each in _domain_violations(spec) if not _is_known(each.field, known))
    violations += found
    return None if found else spec


def _read_kinds(wire: pb.TuningSpec, found: list[Violation]) -> tuple[ProbeKind, Server]:
    probe, server = _PROBE_KINDS_READ.get(wire.probe), _SERVER_KINDS_READ.get(wire.server)
    if probe is None:
        found.append(Violation("spec.probe", f"must be a known kind, e.g. PROBE_KIND_ANALYTIC, is {wire.probe}"))
    if server is None:
        found.append(Violation("spec.server", f"must be a known kind, e.g. SERVER_KIND_TGIS, is {wire.server}"))
    return probe or ProbeKind.ANALYTIC, server or Server.TGIS


def _read_llm(llm: llm_pb2.Llm, found: list[Violation]) -> tuple[str, str]:
    """Return the name of an LLM and its config.json; empty where there is none."""
    name = llm.name
    if name != name.strip() or not name.isprintable() or len(name) > LARGEST_NAME:
        description = f"must be at most {LARGEST_NAME} printable characters without spaces around them"
        found.append(Violation("spec.llm.name", f"{description}, is {name[:80]!r}"))
    match llm.WhichOneof("source"):
        case "spec":
            described = "describes an LLM, which is not enough to know its memory: send its config.json as config_json"
            found.append(Violation("spec.llm.spec", described))
        case "config_json" if (size_bytes := len(llm.config_json.encode())) > LARGEST_CONFIG_BYTES:
            description = f"may have {LARGEST_CONFIG_BYTES:,} bytes, has {size_bytes:,}"
            found.append(Violation("spec.llm.config_json", description))
        case "config_json":
            return name, llm.config_json
        case _ if not name:
            found.append(Violation("spec.llm", "must be set: the name of a bundled LLM, or the text of a config.json"))
        case _:
            bundled = find_bundled(name)
            try:
                return bundled.name if bundled else name, bundled_config(name)
            except NotFoundError as error:
                found.append(Violation("spec.llm.name", f"{error}, as config_json"))
    return name, ""


def _read_memory(wire: pb.TuningSpec, found: list[Violation]) -> _Memory:
    count = wire.gpu_count or 1
    if not wire.gpu_profile:
        if not wire.gpu_memory_bytes:
            described = "must be set to a profile of the catalogue, e.g. 1xA100-40GB; or set gpu_memory_bytes"
            found.append(Violation("spec.gpu_profile", described))
        return _Memory(gpu_count=count, byte_count=wire.gpu_memory_bytes)
    try:
        profile = _catalogue().require(wire.gpu_profile)
    except NotFoundError as error:
        found.append(Violation("spec.gpu_profile", str(error)))
        return _Memory(gpu_count=count, byte_count=wire.gpu_memory_bytes)
    if wire.gpu_count not in {0, profile.gpu_count}:
        described = f"must be 0 or the {profile.gpu_count} of {profile.name}, is {wire.gpu_count}"
        found.append(Violation("spec.gpu_count", described))
    byte_count = wire.gpu_memory_bytes or profile.gpu.usable_memory_bytes
    return _Memory(gpu=profile.gpu, gpu_count=profile.gpu_count, byte_count=byte_count)


@cache
def _catalogue() -> GpuCatalogue:
    return load_catalogue()


def _reserved_bytes(wire: pb.TuningSpec, probe: ProbeKind, memory: _Memory) -> int:
    if wire.HasField("reserved_bytes"):
        return wire.reserved_bytes
    return defaults.default_reserved_bytes(probe, memory.gpu, memory.gpu_count)


def _read_target(wire: pb.TuningSpec, probe: ProbeKind, server: Server, found: list[Violation]) -> ServerTarget | None:
    if not wire.HasField("target"):
        return None
    if probe is not ProbeKind.SERVER:
        found.append(Violation("spec.target", "must not be set: only a probe of kind PROBE_KIND_SERVER has a target"))
    schemes = _SCHEMES[server]
    try:
        parts = urlsplit(wire.target.url)
        is_url = parts.scheme in schemes and bool(parts.hostname) and (parts.port is None or parts.port > 0)
    except ValueError:
        is_url = False
    if not is_url:
        described = f"must be a URL of {' or '.join(schemes)} for {server.value}, is {wire.target.url[:80]!r}"
        found.append(Violation("spec.target.url", described))
    return ServerTarget(url=wire.target.url)


def _positions(config_json: str) -> int | None:
    try:
        return parse_config(config_json).max_position_count if config_json else None
    except InvalidInputError:
        return None  # said with everything else that is wrong


def _domain_violations(spec: TuningSpec) -> list[Violation]:
    """Return what is wrong with a spec, by the names of the wire; raises PreconditionError."""
    try:
        plan_of(spec)
    except InvalidInputError as error:
        return [Violation(_wire_field(each.field), each.description) for each in error.violations]
    return []


def _wire_field(field: str) -> str:
    if field == _CONFIG or field.startswith(f"{_CONFIG}."):
        return f"spec.llm.{field}"
    first, _, rest = field.partition(".")
    return ".".join(part for part in ("spec", _FIELDS.get(first, first), rest) if part)


def _is_known(field: str, known: set[str]) -> bool:
    """Whether a field has been said to be wrong, or follows from one that was."""
    if field in known:
        return True
    is_of_llm = field.startswith("spec.llm") and any(each.startswith("spec.llm") for each in known)
    is_of_memory = field in {"spec.gpu_memory_bytes", "spec.reserved_bytes"} and "spec.gpu_profile" in known
    return is_of_llm or is_of_memory


def write_spec(spec: TuningSpec) -> pb.TuningSpec:
    """Return a spec for the wire, with nothing left to defaults."""
    wire = pb.TuningSpec(
        llm=llm_pb2.Llm(name=spec.llm_name, config_json=spec.config_json),
        probe=PROBE_KINDS[spec.probe],
        server=SERVER_KINDS[spec.server],
        gpu_profile=f"{spec.gpu_count}x{spec.gpu_name}" if spec.gpu_name else "",
        gpu_memory_bytes=spec.gpu_memory_bytes,
        reserved_bytes=spec.reserved_bytes,
        gpu_count=spec.gpu_count,
        precision=spec.precision_name,
        eager_attention=spec.eager_attention,
        longest_sequence=spec.longest_sequence,
        most_new_tokens=spec.most_new_tokens,
        most_requests=spec.most_requests,
        prefill_limit=spec.prefill_limit or 0,
        prompt_logprobs=spec.prompt_logprobs,
        granule=spec.granule,
        precision_share=spec.precision,
        step_seconds=spec.step_seconds,
        soak_steps=spec.soak_steps,
        seed=spec.seed,
    )
    if spec.target is not None:
        wire.target.url = spec.target.url
    return wire
