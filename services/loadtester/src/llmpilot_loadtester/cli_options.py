"""The options of `llm-pilot loadtest run`.

Invariant: what was not given is None or empty, so that defaults are chosen in one place, cli_spec.py.
"""

import re
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import click

from llmpilot_loadtester.domain.spec import Protocol

Callback = Callable[..., None]

DEFAULT_PROFILE = "production"
_UNITS = {"": 1.0, "ms": 0.001, "s": 1.0, "m": 60.0, "h": 3600.0}


class Seconds(click.ParamType[float]):
    """A length of time such as 20s, 500ms, 2m, 1h; a bare number is seconds."""

    name = "time"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> float:
        """Return seconds."""
        if isinstance(value, float):
            return value
        match = re.fullmatch(r"(\d+(?:\.\d+)?|\.\d+)(ms|s|m|h|)", str(value).strip())
        if match is None:
            self.fail(f"{value!r} is no time; write 20s, 500ms, 2m or 1h", param, ctx)
        return float(match[1]) * _UNITS[match[2]]


SECONDS = Seconds()


@dataclass(frozen=True, slots=True, kw_only=True)
class RunOptions:
    """The options as they were given; None: not given."""

    target: str
    protocol: str | None
    served_model: str
    api_key: str
    headers: tuple[str, ...]
    ca_certificates: Path | None
    insecure: bool
    request_timeout: float
    connect_timeout: float
    profile: str | None
    where: tuple[str, ...]
    values: str | None
    independent: bool
    scale: tuple[str, ...]
    context_length: int | None
    replay: bool
    tokenizer: Path | None
    shared_prefix_ratio: float | None
    prefix_groups: int | None
    prompts: Path | None
    input_tokens: int | None
    output_tokens: int | None
    free_length: bool
    users: str | None
    ramp: bool
    rate: str | None
    arrivals: str | None
    burstiness: float | None
    speed: float | None
    at_once: int | None
    request_count: int | None
    duration: float | None
    warm_up: float | None
    search: str | None
    low: float | None
    high: float | None
    precision: float | None
    confidence: float | None
    ttft_ms: float | None
    nttft_ms: float | None
    itl_ms: float | None
    tpot_ms: float | None
    end_to_end_ms: float | None
    slo_share: float | None
    seed: int
    workers: int
    llm: str
    llm_config: Path | None
    gpu_profile: str
    reply_tokenizer: Path | None


_path = click.Path(path_type=Path)
_OPTIONS = (
    click.option(
        "--target", required=True, metavar="URL", help="http://HOST:PORT, https://..., or grpc://... of TGIS."
    ),
    click.option(
        "--protocol",
        type=click.Choice([protocol.value for protocol in Protocol]),
        help="What the server speaks.  [default: tgis for grpc URLs, by the path of others, else openai-completions]",
    ),
    click.option("--served-model", default="", help="Name of the served model.  [default: asked from the server]"),
    click.option(
        "--api-key",
        default="",
        envvar="LLMPILOT_API_KEY",
        help="Sent as a bearer token; better by the variable LLMPILOT_API_KEY, as others see command lines.",
    ),
    click.option(
        "--header", "headers", multiple=True, metavar="NAME=VALUE", help="Header of every request; repeatable."
    ),
    click.option("--ca-certificates", type=_path, help="PEM file of the authorities to trust."),
    click.option("--insecure", is_flag=True, help="Accept any certificate."),
    click.option("--request-timeout", type=SECONDS, default=600.0, help="Limit of one request.  [default: 600s]"),
    click.option("--connect-timeout", type=SECONDS, default=10.0, help="Limit of a connection.  [default: 10s]"),
    click.option(
        "--profile", help=f"Workload profile, or model, that requests are drawn from.  [default: {DEFAULT_PROFILE}]"
    ),
    click.option("--where", multiple=True, metavar="CONDITION", help='Only such requests, e.g. "input_tokens <= 874".'),
    click.option("--values", type=click.Choice(["centre", "uniform", "quantiles"]), help="Which value of its bin."),
    click.option("--independent", is_flag=True, help="Draw every parameter from its own distribution."),
    click.option("--scale", multiple=True, metavar="NAME=FACTOR", help="Scaled parameter; repeatable."),
    click.option("--context-length", type=int, help="Tokens of prompt and reply; prompts are cut."),
    click.option("--replay", is_flag=True, help="The kept requests of the trace, in their order."),
    click.option("--tokenizer", type=_path, help="tokenizer.json by whose count prompts have the drawn lengths."),
    click.option("--shared-prefix-ratio", type=float, help="Share of a prompt in common with others of its group."),
    click.option("--prefix-groups", type=int, help="Groups of prompts that share a prefix."),
    click.option(
        "--prompts", type=_path, help='JSON lines {"prompt": ..., "output_tokens": ...} instead of a profile.'
    ),
    click.option("--input-tokens", type=int, help="Made-up prompts of about this length instead of a profile."),
    click.option("--output-tokens", type=int, help="Reply length of made-up prompts, or where --prompts has none."),
    click.option("--free-length", is_flag=True, help="Let the server end replies before the drawn length."),
    click.option("--users", metavar="N,N,...", help="Concurrent users, a stage each; 0s:1/30s:8 steps within a stage."),
    click.option("--ramp", is_flag=True, help="Go in a straight line between the steps of a stage."),
    click.option("--rate", metavar="R,R,...", help="Requests per second, a stage each."),
    click.option(
        "--arrivals",
        type=click.Choice(["poisson", "constant", "gamma", "trace"]),
        help="When requests are sent.  [default: poisson with --rate]",
    ),
    click.option("--burstiness", type=float, help="Of gamma arrivals: 1 is Poisson, less is burstier."),
    click.option("--speed", type=float, help="How many times faster a trace is replayed."),
    click.option("--at-once", type=int, help="Send so many requests at once."),
    click.option("--request-count", type=int, help="Requests of a stage at most."),
    click.option("--duration", type=SECONDS, help="How long each stage is measured, e.g. 20s.  [default: 2m]"),
    click.option("--warm-up", type=SECONDS, help="Load before that.  [default: a quarter of it, at most 10s]"),
    click.option("--search", type=click.Choice(["users", "rate"]), help="Find the largest load that meets the limits."),
    click.option("--low", type=float, help="Smallest load tried.  [default: 1]"),
    click.option("--high", type=float, help="Largest load tried.  [default: 256 users, 100 requests/s]"),
    click.option("--precision", type=float, help="Share of the answer up to which it is known.  [default: 0.05]"),
    click.option("--confidence", type=float, help="How sure each decision is.  [default: 0.95]"),
    click.option("--ttft-ms", type=float, help="Limit of the time to first token."),
    click.option("--nttft-ms", type=float, help="Limit of the time to first token per input token."),
    click.option("--itl-ms", type=float, help="Limit of a request's mean inter-token latency."),
    click.option("--tpot-ms", type=float, help="Limit of the time per output token."),
    click.option("--end-to-end-ms", type=float, help="Limit of the whole request."),
    click.option("--slo-share", type=float, help="Share of requests that must be within the limits.  [default: 0.95]"),
    click.option("--seed", type=int, default=0, show_default=True, help="The same seed sends the same requests."),
    click.option(
        "--workers", type=int, default=0, help="Processes that send.  [default: as many as CPUs, and users, allow]"
    ),
    click.option("--llm", default="", help="Name of the LLM under test; measurements are published under it."),
    click.option("--llm-config", type=_path, help="Its config.json, where it is not a bundled one."),
    click.option("--gpu-profile", default="", help="GPU profile that serves it, e.g. 1xA100-40GB; goes with --llm."),
    click.option("--reply-tokenizer", type=_path, help="tokenizer.json that counts replies without a usage report."),
)


def run_options(callback: Callback) -> Callback:
    """Add the options to a command's function."""
    for option in reversed(_OPTIONS):
        callback = option(callback)
    return callback
