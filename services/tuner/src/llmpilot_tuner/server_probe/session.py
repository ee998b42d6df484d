"""One server, started or found running, from its first sign of life to its end.

Invariant: a server that was started here is ended when the session is, whatever happened in between.
"""

import asyncio
import time
from collections.abc import AsyncIterator, Mapping, Sequence
from contextlib import asynccontextmanager
from pathlib import Path

from llmpilot_contracts.errors import InvalidInputError, PreconditionError, Violation
from llmpilot_tuner.domain.limits import Limits
from llmpilot_tuner.domain.probing import ProbeError, ProbeTimeoutError
from llmpilot_tuner.domain.servers import Server
from llmpilot_tuner.domain.spec import ServerTarget, TuningSpec
from llmpilot_tuner.outputs.server_settings import VARIABLE, environment_file, server_settings
from llmpilot_tuner.server_probe.case_runner import CaseRunner
from llmpilot_tuner.server_probe.client import RequestFailedError, ServerClient, ServerFacts
from llmpilot_tuner.server_probe.openai_client import OpenAiClient
from llmpilot_tuner.server_probe.prompts import Prompts
from llmpilot_tuner.server_probe.server_log import LogFacts, is_out_of_memory, memory_line, read_log
from llmpilot_tuner.server_probe.server_process import LogFile, ServerProcess
from llmpilot_tuner.server_probe.tgi_client import TgiClient
from llmpilot_tuner.server_probe.wire_tgis_client import TgisClient

_POLL_SECONDS = 0.25
_SETTINGS_FILE = "server.env"
_SCHEMES = {Server.TGIS: ("grpc", "grpcs"), Server.TGI: ("http", "https"), Server.VLLM: ("http", "https")}


class StartOutOfMemoryError(Exception):
    """A server could not even start, for want of memory."""

    def __init__(self, line: str, *, log_facts: LogFacts) -> None:
        self.log_facts = log_facts
        super().__init__(line)


class Session:
    """A server that answers."""

    def __init__(
        self, client: ServerClient, facts: ServerFacts, runner: CaseRunner, log: LogFile, process: ServerProcess | None
    ) -> None:
        self.client = client
        self.facts = facts
        self.runner = runner
        self.process = process
        self._log = log

    @property
    def log_facts(self) -> LogFacts:
        """What its log says of memory so far."""
        return read_log(self._log.all())

    async def is_alive(self) -> bool:
        """Whether it still answers."""
        return (self.process is None or self.process.ending is None) and await self.client.is_healthy()


def target_violations(spec: TuningSpec) -> list[Violation]:
    """Return what is wrong with the server of a spec."""
    target = spec.target
    if target is None:
        return [Violation("target", "is missing: a server probe needs the address of a server")]
    found = []
    scheme, _, address = target.url.rpartition("://")
    schemes = _SCHEMES[spec.server]
    if scheme not in schemes or not address.strip("/"):
        found.append(
            Violation("target.url", f"must be {schemes[0]}://HOST:PORT for {spec.server}, is {target.url[:100]!r}")
        )
    if not target.start_seconds > 0:
        found.append(Violation("target.start_seconds", f"must be > 0, is {target.start_seconds}"))
    return found


def filled_command(command: Sequence[str], settings: Mapping[str, str], *, settings_file: Path) -> tuple[str, ...]:
    """Return the command with "{weight}", "{settings_file}" and "{NAME}" of every setting filled in.

    An argument that is nothing but a setting of several words becomes several arguments. Raises InvalidInputError for
    a name that no setting has.
    """
    values = {"weight": settings[VARIABLE], "settings_file": str(settings_file), **settings}
    filled: list[str] = []
    for argument in command:
        try:
            text = argument.format_map(values)
        except (KeyError, ValueError, IndexError, AttributeError) as error:
            raise InvalidInputError(
                [
                    Violation(
                        "target.command",
                        f"{argument[:100]!r} cannot be filled in: it may have {{{'}, {'.join(values)}}}; write other "
                        "braces twice",
                    )
                ]
            ) from error
        is_setting = argument.startswith("{") and argument[1:-1] in settings
        filled += text.split() if is_setting else [text]
    return tuple(filled)


@asynccontextmanager
async def running_server(spec: TuningSpec, limits: Limits, prompts: Prompts) -> AsyncIterator[Session]:
    """Speak to a server that runs; raises ProbeError where it does not answer."""
    target = _target(spec)
    client = _client(spec.server, target.url, prompts)
    log = LogFile(target.log_file)
    try:
        if not await client.is_healthy():
            raise ProbeError(f"no healthy {spec.server} server answers at {target.url}: start it, or give its command")
        yield await _session(spec, limits, client, log, None)
    finally:
        await client.close()


@asynccontextmanager
async def started_server(spec: TuningSpec, limits: Limits, prompts: Prompts, weight: int) -> AsyncIterator[Session]:
    """Start the server with a maximum batch weight, and end it in the end.

    Raises StartOutOfMemoryError, ProbeError, or PreconditionError where another one is there already.
    """
    target = _target(spec)
    client = _client(spec.server, target.url, prompts)
    process = ServerProcess()
    try:
        if await client.is_healthy():
            raise PreconditionError(
                f"another server answers at {target.url}: end it, or leave out the command to tune that one"
            )
        settings = server_settings(limits, weight, gpu_count=spec.gpu_count)
        settings_file = process.folder / _SETTINGS_FILE
        settings_file.write_text(environment_file(limits, weight, gpu_count=spec.gpu_count), encoding="utf-8")
        await process.start(filled_command(target.command, settings, settings_file=settings_file), settings)
        await _await_health(client, process, target)
        yield await _session(spec, limits, client, process.log, process)
    finally:
        try:
            await client.close()
        finally:
            await process.stop()


async def _await_health(client: ServerClient, process: ServerProcess, target: ServerTarget) -> None:
    deadline = time.monotonic() + target.start_seconds
    while not await client.is_healthy():
        if process.ending is not None:
            said = process.log.all()
            if is_out_of_memory(said):
                raise StartOutOfMemoryError(memory_line(said), log_facts=read_log(said))
            raise ProbeError(
                f"the server {process.ending} before it answered, and not for want of memory; see its log",
                log=process.log.tail(),
            )
        if time.monotonic() > deadline:
            raise ProbeTimeoutError(
                f"the server did not answer at {target.url} within {target.start_seconds:g} s: does its command listen "
                "there? If it is only slow, allow more with start_seconds",
                log=process.log.tail(),
            )
        await asyncio.sleep(_POLL_SECONDS)


async def _session(
    spec: TuningSpec, limits: Limits, client: ServerClient, log: LogFile, process: ServerProcess | None
) -> Session:
    try:
        facts = await client.facts()
    except RequestFailedError as error:
        raise ProbeError(f"the server does not say what it is: {error}", log=log.tail()) from error
    _require_limits(facts, limits)
    runner = CaseRunner(
        client,
        limits=limits,
        log=log,
        process=process,
        step_seconds=spec.step_seconds,
        longest_input=facts.longest_input,
    )
    return Session(client, facts, runner, log, process)


def _require_limits(facts: ServerFacts, limits: Limits) -> None:
    """Raise InvalidInputError where the server would refuse the longest requests."""
    pairs = (
        ("longest_sequence", limits.longest_sequence, facts.longest_sequence),
        ("most_new_tokens", limits.most_new_tokens, facts.most_new_tokens),
    )
    violations = [
        Violation(f"limits.{name}", f"is {ours:,}, the server admits {theirs:,}: set both to the same")
        for name, ours, theirs in pairs
        if theirs is not None and ours > theirs
    ]
    if violations:
        raise InvalidInputError(violations)


def _target(spec: TuningSpec) -> ServerTarget:
    if violations := target_violations(spec):
        raise InvalidInputError(violations)
    assert spec.target is not None  # noqa: S101 what target_violations says first
    return spec.target


def _client(server: Server, url: str, prompts: Prompts) -> ServerClient:
    match server:
        case Server.TGIS:
            return TgisClient(url, prompts)
        case Server.TGI:
            return TgiClient(url, prompts)
        case Server.VLLM:
            return OpenAiClient(url, prompts)
