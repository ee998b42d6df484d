"""`llm-pilot up`: keeps a platform running in the foreground."""

import os
import shlex
import socket
import sys
from pathlib import Path

import click

from llmpilot_console.plugins import installed_services
from llmpilot_console.state_directory import RunningPlatform, StateDirectory, default_state_path
from llmpilot_console.supervisor import Supervisor, running_in_background
from llmpilot_contracts.errors import InvalidInputError, Violation

DEFAULT_PORT = 50051
PORT_SERVICE = "recommender"
"""The service that people call, and to which --port applies."""

_LLM = "meta-llama/Llama-3.1-8B"
_LIST_MODELS = "llmpilot.recommendation.v1.RecommendationService/ListModels"


@click.command()
@click.option(
    "--state-dir",
    type=click.Path(path_type=Path, file_okay=False),
    help="Where measurements and logs are kept.  [default: LLMPILOT_HOME, else llm-pilot in the XDG state folder]",
)
@click.option(
    "--port",
    type=click.IntRange(0, 65535),
    help=f"Port of the {PORT_SERVICE}; 0: any free one.  [default: {DEFAULT_PORT} if free]",
)
def up(state_dir: Path | None, port: int | None) -> None:
    """Keep the platform running on this machine until Ctrl-C."""
    path = (state_dir or default_state_path(os.environ)).resolve()
    supervisor = Supervisor(
        path,
        installed_services(),
        listen={PORT_SERVICE: f"127.0.0.1:{_choose_port(port)}"},
        report=lambda line: click.echo(line, err=True),
    )
    try:
        with running_in_background(supervisor) as run:
            if port is None and _listens_elsewhere(run.platform):
                click.echo(f"port {DEFAULT_PORT} is taken; the {PORT_SERVICE} uses a free one", err=True)
            click.echo(describe(run.platform, path))
            run.ended.result()
    except KeyboardInterrupt:
        click.echo("stopped", err=True)


def _listens_elsewhere(platform: RunningPlatform) -> bool:
    service = platform.services.get(PORT_SERVICE)
    return service is not None and not service.grpc.endswith(f":{DEFAULT_PORT}")


def _choose_port(port: int | None) -> int:
    if port is None:
        return DEFAULT_PORT if _is_free(DEFAULT_PORT) else 0
    if port and not _is_free(port):
        raise InvalidInputError([Violation("--port", f"{port} is taken; choose another, or 0 for any free one")])
    return port


def _is_free(port: int) -> bool:
    with socket.socket() as trial:
        trial.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            trial.bind(("127.0.0.1", port))
        except OSError:
            return False
    return True


def describe(platform: RunningPlatform, state_dir: Path) -> str:
    """Say where the platform listens and how to ask it from a terminal with other settings than this one."""
    lines = ["LLM-Pilot runs. Ctrl-C stops it.", ""]
    for name, addresses in platform.services.items():
        metrics = f", metrics http://{addresses.metrics}/metrics" if addresses.metrics else ""
        lines.append(f"  {name}: gRPC {addresses.grpc}{metrics}")
    lines += [f"  NATS: {platform.nats_url}", f"  logs: {StateDirectory(state_dir).logs}"]
    if called := platform.services.get(PORT_SERVICE):
        program = Path(sys.argv[0])
        words = [sys.executable, "-m", "llmpilot_console"] if program.name == "__main__.py" else [str(program)]
        found = state_dir == default_state_path({}).resolve()
        home = "" if found else f"LLMPILOT_HOME={shlex.quote(str(state_dir))} "
        buf = program.with_name("buf")
        lines += [
            "",
            "Ask it, from another terminal:",
            f"  {home}{shlex.join(words)} recommend --config {_LLM} --users 100 --nttft-ms 100 --itl-ms 50",
            "or with any gRPC client, e.g. buf (`pip install buf-bin`):",
            f"  {shlex.quote(str(buf)) if buf.exists() else 'buf'} curl --protocol grpc --http2-prior-knowledge \\",
            f"    http://{called.grpc}/{_LIST_MODELS}",
        ]
    return "\n".join(lines)
