"""A load test as the command line asks the service for it, and what the service says of it in the command's words.

Invariant: unlike the spec that the service shows, the one that is asked for is whole: keys, prompts, tokenizers.
"""

import re

from llmpilot.loadtest.v1 import loadtest_pb2 as pb
from llmpilot_contracts.errors import InvalidInputError, Violation
from llmpilot_loadtester.domain.spec import LoadTestSpec, PromptRequests, WorkloadRequests
from llmpilot_loadtester.wire_spec import write_spec

_OPTIONS = {
    "load_test_id": "--name",
    "spec.target": "--target",
    "spec.target.protocol": "--protocol",
    "spec.target.served_model": "--served-model",
    "spec.target.api_key": "--api-key",
    "spec.target.headers": "--header",
    "spec.target.ca_certificates_pem": "--ca-certificates",
    "spec.target.request_timeout_seconds": "--request-timeout",
    "spec.target.connect_timeout_seconds": "--connect-timeout",
    "spec.workload": "--profile",
    "spec.workload.sampling.conditions": "--where",
    "spec.workload.sampling.value_choice": "--values",
    "spec.workload.sampling.independent": "--independent",
    "spec.workload.sampling.scales": "--scale",
    "spec.workload.sampling.context_length": "--context-length",
    "spec.workload.sampling.replay": "--replay or --arrivals trace",
    "spec.workload.sampling.seed": "--seed",
    "spec.workload.tokenizer_json": "--tokenizer",
    "spec.workload.shared_prefix_ratio": "--shared-prefix-ratio",
    "spec.workload.prefix_group_count": "--prefix-groups",
    "spec.prompts": "--prompts",
    "spec.prompts.output_tokens": "--output-tokens",
    "spec.synthetic.input_tokens": "--input-tokens",
    "spec.synthetic.output_tokens": "--output-tokens",
    "spec.synthetic.seed": "--seed",
    "spec.stages": "--users or --rate",
    "spec.stages.load.user_steps": "--users",
    "spec.stages.load.kind": "--arrivals",
    "spec.stages.load.rate_per_second": "--rate",
    "spec.stages.load.burstiness": "--burstiness",
    "spec.stages.load.speed": "--speed",
    "spec.stages.load.request_count": "--request-count or --at-once",
    "spec.stages.warm_up_seconds": "--warm-up",
    "spec.stages.measure_seconds": "--duration",
    "spec.search": "--search",
    "spec.search.kind": "--arrivals",
    "spec.search.low": "--low",
    "spec.search.high": "--high",
    "spec.search.precision": "--precision",
    "spec.search.confidence": "--confidence",
    "spec.search.warm_up_seconds": "--warm-up",
    "spec.search.measure_seconds": "--duration",
    "spec.service_level.ttft_ms": "--ttft-ms",
    "spec.service_level.nttft_ms": "--nttft-ms",
    "spec.service_level.itl_ms": "--itl-ms",
    "spec.service_level.tpot_ms": "--tpot-ms",
    "spec.service_level.end_to_end_ms": "--end-to-end-ms",
    "spec.service_level.share": "--slo-share",
    "spec.seed": "--seed",
    "spec.worker_count": "--workers",
    "spec.llm": "--llm",
    "spec.llm.config_json": "--llm-config",
    "spec.gpu_profile": "--gpu-profile",
    "spec.reply_tokenizer_json": "--reply-tokenizer",
}
_FIELD = re.compile(r"\bspec(?:\.\w+(?:\[\d+\])?)+|\bload_test_id\b")


def requested_spec(spec: LoadTestSpec, *, llm_config_json: str) -> pb.LoadTestSpec:
    """Return a spec with all that it needs to be run; an empty config is none."""
    wire = write_spec(spec)
    wire.target.url = spec.target.url
    wire.target.api_key = spec.target.api_key
    wire.target.ca_certificates_pem = spec.target.ca_certificates_pem.encode()
    wire.reply_tokenizer_json = spec.reply_tokenizer_json
    for header, (_, value) in zip(wire.target.headers, spec.target.headers, strict=True):
        header.value = value
    if llm_config_json:
        wire.llm.config_json = llm_config_json
    if isinstance(spec.requests, WorkloadRequests):
        wire.workload.tokenizer_json = spec.requests.tokenizer_json
    elif isinstance(spec.requests, PromptRequests):
        wire.prompts.jsonl = spec.requests.jsonl
    return wire


def in_options(text: str) -> str:
    """Return a text about fields of a spec with the options that set them instead."""
    return _FIELD.sub(lambda match: _option_of(match[0]), text)


def error_in_options(error: InvalidInputError) -> InvalidInputError:
    """Return what is wrong by option, each once: one option may set several fields."""
    violations = (Violation(in_options(each.field), in_options(each.description)) for each in error.violations)
    return InvalidInputError(dict.fromkeys(violations))


def _option_of(field: str) -> str:
    path = re.sub(r"\[\d+\]", "", field)
    while path:
        if option := _OPTIONS.get(path):
            return option
        path = path.rpartition(".")[0]
    return field
