"""What `llm-pilot simulate serve` does: turn its options into settings, say where it listens, serve until told to stop.

Invariant: every wrong option is told before anything listens.
"""

import asyncio
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar

import click

from llmpilot_contracts.errors import InvalidInputError, Violation
from llmpilot_servicekit.progress import noted_if_slow
from llmpilot_simulator.app import Addresses, build, run
from llmpilot_simulator.deployment import (
    COMPILING,
    DeploymentRequest,
    context_length_of,
    deploy,
    read_llm,
)
from llmpilot_simulator.faults import Faults, ServerFaults, parse_faults
from llmpilot_simulator.generation import ReplyLengths
from llmpilot_simulator.settings import FixedTimes, ModelledTimes, SimulatorSettings, Times

T = TypeVar("T")


@dataclass(frozen=True, slots=True, kw_only=True)
class ServeRequest:
    """The options of the command."""

    deployment: DeploymentRequest
    http_address: str
    grpc_address: str
    fixed_ttft_ms: float | None
    fixed_itl_ms: float | None
    reply_tokens: float | None
    endless: bool
    seed: int
    frontend_us: float
    write_log: Path | None
    fault: str | None
    reject_share: float
    reject_above: int | None
    reject_status: int
    slow_start_seconds: float
    grace_seconds: float


@dataclass(frozen=True, slots=True, kw_only=True)
class _Served:
    """What the server is said to be."""

    name: str
    context_length: int
    is_encoder_decoder: bool
    times: Times
    notes: tuple[str, ...]


def serve_until_stopped(request: ServeRequest) -> None:
    """Serve until SIGTERM or Ctrl-C; raises InvalidInputError with every wrong option."""
    settings, notes = simulator_settings(request)

    def ready(addresses: Addresses) -> None:
        for note in notes:
            click.echo(note)
        click.echo(f"OpenAI and TGI at http://{addresses.http}, TGIS at {addresses.grpc}; Ctrl-C stops")

    with noted_if_slow(COMPILING):
        application = build(settings)
    asyncio.run(run(application, ready=ready))


def simulator_settings(request: ServeRequest) -> tuple[SimulatorSettings, tuple[str, ...]]:
    """Return the settings, and what to tell whoever starts the server."""
    violations: list[Violation] = []
    faults = _collect(lambda: _faults(request), violations)
    lengths = _collect(lambda: _reply_lengths(request), violations)
    if request.seed < 0:
        violations.append(Violation("seed", f"must be >= 0, is {request.seed}"))
    is_fixed = request.fixed_ttft_ms is not None or request.fixed_itl_ms is not None
    if is_fixed and (request.fixed_ttft_ms is None or request.fixed_itl_ms is None):
        violations.append(Violation("fixed_ttft_ms", "goes with fixed_itl_ms: give both or none"))
    if not is_fixed and request.deployment.gpu_profile is None:
        violations.append(Violation("gpu", "is missing; name a profile such as 1xA100-40GB, or fix the times"))
    if violations or faults is None or lengths is None:
        raise InvalidInputError(violations)
    served = _fixed(request) if is_fixed else _modelled(request)
    settings = SimulatorSettings(
        model_id=served.name,
        context_length=served.context_length,
        times=served.times,
        is_encoder_decoder=served.is_encoder_decoder,
        http_address=request.http_address,
        grpc_address=request.grpc_address,
        reply_lengths=lengths,
        seed=request.seed,
        faults=faults,
        write_log=request.write_log,
        shutdown_grace_seconds=request.grace_seconds,
    )
    return settings, served.notes


def _collect(make: Callable[[], T], violations: list[Violation]) -> T | None:
    try:
        return make()
    except InvalidInputError as error:
        violations.extend(error.violations)
        return None


def _faults(request: ServeRequest) -> ServerFaults:
    return ServerFaults(
        each_request=parse_faults(request.fault, Faults()),
        reject_share=request.reject_share,
        reject_above_waiting=request.reject_above,
        reject_status=request.reject_status,
        slow_start_seconds=request.slow_start_seconds,
        seed=request.seed,
    )


def _reply_lengths(request: ServeRequest) -> ReplyLengths:
    default = ReplyLengths()
    median = default.median_tokens if request.reply_tokens is None else request.reply_tokens
    return ReplyLengths(median_tokens=median, log_deviation=default.log_deviation, never_ends=request.endless)


def _fixed(request: ServeRequest) -> _Served:
    name, config = read_llm(request.deployment.llm)
    ttft_ms, itl_ms = request.fixed_ttft_ms or 0.0, request.fixed_itl_ms or 0.0
    return _Served(
        name=name,
        context_length=context_length_of(request.deployment, config),
        is_encoder_decoder=config.spec.is_encoder_decoder,
        times=FixedTimes(ttft_seconds=ttft_ms / 1e3, itl_seconds=itl_ms / 1e3),
        notes=(f"{name}, simulated: TTFT {ttft_ms:g} ms, ITL {itl_ms:g} ms, whatever the load",),
    )


def _modelled(request: ServeRequest) -> _Served:
    deployment = deploy(request.deployment)
    times = ModelledTimes(
        policy=deployment.policy,
        tables=deployment.step_constants.tables(),
        out_of_memory_tokens=deployment.out_of_memory_tokens,
        frontend_seconds_per_token=request.frontend_us / 1e6,
    )
    return _Served(
        name=deployment.llm_name,
        context_length=deployment.context_length,
        is_encoder_decoder=deployment.is_encoder_decoder,
        times=times,
        notes=(f"{deployment.name}, {deployment.policy_name}, simulated", *deployment.notes(explain=False)),
    )
