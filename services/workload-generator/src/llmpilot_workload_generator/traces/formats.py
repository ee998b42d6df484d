"""The trace formats that are known by their columns, and how each is to be understood.

Invariant: adding a format is adding a row to the table; no reader knows a format by name. Where two formats match, the
one with more telling columns wins, so the order of the table has no meaning.
"""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from enum import StrEnum

from llmpilot_workload_generator.model import BATCH_SIZE, INPUT_TOKENS, OUTPUT_TOKENS

FieldPath = tuple[str, ...]
"""The name of a column, or the keys that lead to a value inside JSON objects."""

TABLE = "table"
"""The format of files nobody knows: every column is a parameter, unless it is a time or an identifier."""


class TimeUnit(StrEnum):
    """What a number or text says about when a request arrived."""

    SECONDS = "seconds"
    MILLISECONDS = "milliseconds"
    NANOSECONDS = "nanoseconds"
    DATE_TIME = "a date and time"
    """ISO 8601; UTC unless it says otherwise."""


@dataclass(frozen=True, slots=True, kw_only=True)
class TimeField:
    """Where arrival times are."""

    path: FieldPath
    unit: TimeUnit
    is_absolute: bool
    """Counts from 1970, not from the start of the trace."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Success:
    """What tells that a request did not fail."""

    path: FieldPath
    values: frozenset[str]
    """As text."""
    or_empty: bool = False
    """Whether no value at all is success, too."""


@dataclass(frozen=True, slots=True, kw_only=True)
class PrefixField:
    """Where the ids of the blocks of a prompt are."""

    path: FieldPath
    block_tokens: int


@dataclass(frozen=True, slots=True, kw_only=True)
class TraceFormat:
    """A format somebody publishes traces in."""

    name: str
    source: str
    licence: str
    """Of the published traces; empty where everybody makes their own."""
    seen_in: str
    """What its fields were learnt from."""
    signature: frozenset[str]
    """The columns, or keys of the outermost JSON object, that tell it from the others."""
    columns: Mapping[str, FieldPath]
    """The parameters."""
    optional: frozenset[str] = frozenset()
    """Parameters that some files of the format do not have."""
    extras: Mapping[str, FieldPath] = field(default_factory=dict)
    """Parameters that are taken only if they are asked for."""
    times: tuple[TimeField, ...] = ()
    """The first one that a file has counts; a file may have none."""
    successes: tuple[Success, ...] = ()
    """A request that breaks one of them failed; so did one without output."""
    prefix: PrefixField | None = None
    has_utc_offsets: bool | None = None
    """Tells apart formats with the same columns: whether a date and time ends with its distance from UTC. None: any."""


def _lengths(input_path: FieldPath, output_path: FieldPath) -> dict[str, FieldPath]:
    return {INPUT_TOKENS: input_path, OUTPUT_TOKENS: output_path}


_AZURE_COLUMNS = _lengths(("ContextTokens",), ("GeneratedTokens",))
_AZURE_TIME = TimeField(path=("TIMESTAMP",), unit=TimeUnit.DATE_TIME, is_absolute=True)
_AZURE_SIGNATURE = frozenset({"TIMESTAMP", "ContextTokens", "GeneratedTokens"})

FORMATS: tuple[TraceFormat, ...] = (
    TraceFormat(
        name="azure-2023",
        source="Azure LLM inference trace 2023",
        licence="CC-BY-4.0",
        seen_in="Azure/AzurePublicDataset: AzureLLMInferenceTrace_code.csv, _conv.csv",
        signature=_AZURE_SIGNATURE,
        columns=_AZURE_COLUMNS,
        times=(_AZURE_TIME,),
        has_utc_offsets=False,
    ),
    TraceFormat(
        name="azure-2024",
        source="Azure LLM inference trace 2024",
        licence="CC-BY-4.0",
        seen_in="Azure/AzurePublicDataset: the week of May 2024; as described, its files were not at hand",
        signature=_AZURE_SIGNATURE,
        columns=_AZURE_COLUMNS,
        times=(_AZURE_TIME,),
        has_utc_offsets=True,
    ),
    TraceFormat(
        name="burstgpt",
        source="BurstGPT",
        licence="CC-BY-4.0",
        seen_in="HPMLL/BurstGPT: release 1 and 2; as described, its files were not at hand",
        signature=frozenset({"Timestamp", "Request tokens", "Response tokens"}),
        columns=_lengths(("Request tokens",), ("Response tokens",)),
        extras={"model": ("Model",), "log_type": ("Log Type",)},
        times=(TimeField(path=("Timestamp",), unit=TimeUnit.SECONDS, is_absolute=False),),
    ),
    TraceFormat(
        name="mooncake",
        source="Mooncake",
        licence="Apache-2.0",
        seen_in="kvcache-ai/Mooncake: FAST25-release/traces",
        signature=frozenset({"timestamp", "input_length", "output_length", "hash_ids"}),
        columns=_lengths(("input_length",), ("output_length",)),
        times=(TimeField(path=("timestamp",), unit=TimeUnit.MILLISECONDS, is_absolute=False),),
        prefix=PrefixField(path=("hash_ids",), block_tokens=512),
    ),
    TraceFormat(
        name="servegen",
        source="ServeGen offline inference traces",
        licence="Apache-2.0",
        seen_in="alibaba/ServeGen: data/offline; a file has output_length or hash_ids. (Its data/language, /reason and "
        "/multimodal are no requests but each client's own distributions.)",
        signature=frozenset({"request_id", "type", "input_length"}),
        columns=_lengths(("input_length",), ("output_length",)),
        optional=frozenset({OUTPUT_TOKENS}),
        extras={"type": ("type",)},
        prefix=PrefixField(path=("hash_ids",), block_tokens=16),
    ),
    TraceFormat(
        name="vidur",
        source="vidur",
        licence="MIT",
        seen_in="microsoft/vidur: data/processed_traces",
        signature=frozenset({"num_prefill_tokens", "num_decode_tokens"}),
        columns=_lengths(("num_prefill_tokens",), ("num_decode_tokens",)),
        times=(TimeField(path=("arrived_at",), unit=TimeUnit.SECONDS, is_absolute=False),),
    ),
    TraceFormat(
        name="vllm",
        source="vllm bench serve",
        licence="",
        seen_in="vLLM of 2026: benchmarks/serve.py, --save-result --save-detailed; its clock has no date",
        signature=frozenset({"input_lens", "output_lens"}),
        columns=_lengths(("input_lens",), ("output_lens",)),
        times=(TimeField(path=("start_times",), unit=TimeUnit.SECONDS, is_absolute=False),),
        successes=(Success(path=("errors",), values=frozenset({""}), or_empty=True),),
    ),
    TraceFormat(
        name="guidellm",
        source="guidellm",
        licence="",
        seen_in="guidellm 0.3 and later: GenerativeRequestStats in benchmarks[].requests",
        signature=frozenset({"benchmarks"}),
        columns=_lengths(("benchmarks", "prompt_tokens"), ("benchmarks", "output_tokens")),
        times=(TimeField(path=("benchmarks", "start_time"), unit=TimeUnit.SECONDS, is_absolute=True),),
        successes=(Success(path=("benchmarks", "status"), values=frozenset({"successful"})),),
    ),
    TraceFormat(
        name="aiperf",
        source="AIPerf",
        licence="",
        seen_in="AIPerf 0.8: MetricRecordInfo, profile_export.jsonl",
        signature=frozenset({"metadata", "metrics"}),
        columns=_lengths(("metrics", "input_sequence_length", "value"), ("metrics", "output_sequence_length", "value")),
        times=(TimeField(path=("metadata", "request_start_ns"), unit=TimeUnit.NANOSECONDS, is_absolute=True),),
        successes=(
            Success(path=("error",), values=frozenset(), or_empty=True),
            Success(path=("metadata", "was_cancelled"), values=frozenset({"false"}), or_empty=True),
        ),
    ),
    TraceFormat(
        name="characterization",
        source="IBM/LLM-performance-prediction (Lazuka et al., 2024)",
        licence="CDLA-Permissive-2.0",
        seen_in="IBM/LLM-performance-prediction: performance_characterization_data_raw; `requests` is 1 everywhere",
        signature=frozenset({"n_input_tokens", "n_output_tokens", "status", "requests", "latency_ms_per_token"}),
        columns={**_lengths(("n_input_tokens",), ("n_output_tokens",)), BATCH_SIZE: ("requests",)},
        times=(TimeField(path=("start_timestamp",), unit=TimeUnit.MILLISECONDS, is_absolute=True),),
        successes=(Success(path=("status",), values=frozenset({"200", "200.0"})),),
    ),
    TraceFormat(
        name="llm-pilot",
        source="LLM-Pilot request records",
        licence="",
        seen_in="llmpilot_contracts.record_schema, version 1",
        signature=frozenset({"input_token_count", "output_token_count", "status", "scheduled_time_nanos"}),
        columns=_lengths(("input_token_count",), ("output_token_count",)),
        times=(TimeField(path=("scheduled_time_nanos",), unit=TimeUnit.NANOSECONDS, is_absolute=False),),
        successes=(Success(path=("status",), values=frozenset({"ok"})),),
    ),
)

FORMAT_NAMES: tuple[str, ...] = (*(known.name for known in FORMATS), TABLE)


def formats_with(names: Iterable[str]) -> tuple[TraceFormat, ...]:
    """Return the formats that these columns may be, of equally many telling columns; empty: none is known."""
    there = frozenset(names)
    matching = [known for known in FORMATS if known.signature <= there]
    most = max((len(known.signature) for known in matching), default=0)
    return tuple(known for known in matching if len(known.signature) == most)


def format_named(name: str) -> TraceFormat | None:
    """Return a format of the table."""
    return next((known for known in FORMATS if known.name == name), None)
