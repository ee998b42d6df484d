"""What an inference server is started with, so that it keeps to the weight that was found: a file of variables.

Invariant: the file is at once one for `.` of a shell and, but for quotes, for `docker run --env-file`: comments and
NAME=value lines, each value in quotes where it has more than letters, digits and a few signs. Sources: TGIS
launcher/src/main.rs, January 2024; TGI 3 docs/source/reference/launcher.md; vLLM 0.19 `vllm serve --help`.
"""

import shlex

from llmpilot_tuner.domain.limits import Limits
from llmpilot_tuner.domain.servers import Server

TGIS_CONCURRENCY = 512
"""Requests that may be in TGIS, those that wait included; it refuses more. Never fewer than a batch holds."""
VARIABLE = "LLMPILOT_MAX_BATCH_WEIGHT"
"""Stands in the file of every server."""


def server_settings(limits: Limits, weight: int, *, gpu_count: int = 1) -> dict[str, str]:
    """Return the variables, by name, in the order of the file."""
    match limits.rules.server:
        case Server.TGIS:
            settings = _tgis(limits, weight, gpu_count)
        case Server.TGI:
            settings = _tgi(limits, weight, gpu_count)
        case Server.VLLM:
            settings = _vllm(limits, weight, gpu_count)
    return {VARIABLE: str(weight), **settings}


def environment_file(limits: Limits, weight: int, *, gpu_count: int = 1, facts: str = "") -> str:
    """Return the text of the file; facts: a line that says what the weight was found for, and how."""
    comments = [f"# {line}" for line in (*facts.splitlines(), *_advice(limits))]
    lines = [
        f"{name}={shlex.quote(value)}" for name, value in server_settings(limits, weight, gpu_count=gpu_count).items()
    ]
    return "\n".join([*comments, *lines, ""])


def vllm_arguments(limits: Limits, weight: int, *, gpu_count: int = 1) -> tuple[str, ...]:
    """Return the arguments of `vllm serve`: the blocks of the cache are what the weight comes to."""
    block_size = limits.rules.block_size
    arguments = {
        "--max-model-len": limits.longest_sequence,
        "--max-num-seqs": limits.most_requests,
        "--max-num-batched-tokens": _prefill_limit(limits, weight),
        "--block-size": block_size,
        "--num-gpu-blocks-override": weight // block_size,
        "--tensor-parallel-size": gpu_count,
    }
    return tuple(f"{name}={value}" for name, value in arguments.items())


def _advice(limits: Limits) -> tuple[str, ...]:
    match limits.rules.server:
        case Server.TGIS:
            return ("set -a; . THIS_FILE; set +a; exec text-generation-launcher",)
        case Server.TGI:
            return (
                "set -a; . THIS_FILE; set +a; exec text-generation-launcher --model-id MODEL",
                "TGI counts the tokens of the batch itself where it has flash attention: it then warns, and takes no",
                "MAX_BATCH_TOTAL_TOKENS; MAX_BATCH_PREFILL_TOKENS and MAX_TOTAL_TOKENS count in any case.",
            )
        case Server.VLLM:
            return ('vLLM takes these as arguments: sh -c ". THIS_FILE; exec vllm serve MODEL $LLMPILOT_VLLM_ARGS"',)


def _tgis(limits: Limits, weight: int, gpu_count: int) -> dict[str, str]:
    numbers = {
        "MAX_BATCH_WEIGHT": weight,
        "MAX_PREFILL_WEIGHT": _prefill_limit(limits, weight),
        "MAX_BATCH_SIZE": limits.most_requests,
        "MAX_SEQUENCE_LENGTH": limits.longest_sequence,
        "MAX_NEW_TOKENS": limits.most_new_tokens,
        "MAX_CONCURRENT_REQUESTS": max(TGIS_CONCURRENCY, limits.most_requests),
        "NUM_SHARD": gpu_count,
    }
    return {name: str(number) for name, number in numbers.items()}


def _tgi(limits: Limits, weight: int, gpu_count: int) -> dict[str, str]:
    numbers = {
        "MAX_BATCH_TOTAL_TOKENS": weight,
        "MAX_BATCH_PREFILL_TOKENS": min(weight, _prefill_limit(limits, weight)),  # TGI refuses more
        "MAX_TOTAL_TOKENS": limits.longest_sequence,
        "MAX_INPUT_TOKENS": limits.longest_input,
        "MAX_BATCH_SIZE": limits.most_requests,
        "NUM_SHARD": gpu_count,
    }
    return {name: str(number) for name, number in numbers.items()}


def _vllm(limits: Limits, weight: int, gpu_count: int) -> dict[str, str]:
    arguments = vllm_arguments(limits, weight, gpu_count=gpu_count)
    separate = {
        f"LLMPILOT_VLLM_{name.removeprefix('--').replace('-', '_').upper()}": value
        for name, _, value in (argument.partition("=") for argument in arguments)
    }
    return {"LLMPILOT_VLLM_ARGS": " ".join(arguments), **separate}


def _prefill_limit(limits: Limits, weight: int) -> int:
    """Return the limit that was tuned with; None is a prefill as large as the batch."""
    return weight if limits.prefill_limit is None else limits.prefill_limit
