"""`llm-pilot simulate serve`: a simulated inference server that real clients talk to."""

from pathlib import Path

import click

from llmpilot_simulator.cli_options import deployment_options


@click.command()
@deployment_options
@click.option("--gpu", "gpu_profile", metavar="PROFILE", help="E.g. 1xA100-40GB; needed unless the times are fixed.")
@click.option(
    "--http", "http_address", default="127.0.0.1:8000", show_default=True, help="OpenAI and TGI; port 0: any."
)
@click.option("--grpc", "grpc_address", default="127.0.0.1:8033", show_default=True, help="TGIS; port 0: any.")
@click.option("--context-length", type=int, help="Tokens of prompt and reply.  [default: the config.json's]")
@click.option("--fixed-ttft-ms", type=float, help="Every first token leaves after this time; goes with --fixed-itl-ms.")
@click.option("--fixed-itl-ms", type=float, help="Every other token leaves this long after the one before.")
@click.option("--reply-tokens", type=float, help="Median length of a reply that nothing cuts.  [default: 145]")
@click.option("--endless", is_flag=True, help="Replies end at their limit only.")
@click.option("--seed", default=0, show_default=True, help="Of lengths, texts and rejections.")
@click.option("--frontend-us", default=0.0, show_default=True, help="Microseconds the API server takes for a token.")
@click.option("--write-log", type=click.Path(path_type=Path), help="File for the true write time of every token.")
@click.option("--fault", metavar="FAULTS", help='For every request, e.g. "drop-after=3, stream-interval=4".')
@click.option("--reject-share", default=0.0, show_default=True, help="Share of the requests that are rejected.")
@click.option("--reject-above", type=int, help="Reject requests while more than this many wait.")
@click.option("--reject-status", default=429, show_default=True, help="429 or 503.")
@click.option("--slow-start", default=0.0, show_default=True, help="Seconds until the server is ready.")
@click.option("--grace", default=5.0, show_default=True, help="Seconds that streams may go on after SIGTERM.")
def serve(
    *,
    llm: str,
    policy: str,
    max_batch_weight: int | None,
    precision: str | None,
    gpus: Path | None,
    gpu_profile: str | None,
    http_address: str,
    grpc_address: str,
    context_length: int | None,
    fixed_ttft_ms: float | None,
    fixed_itl_ms: float | None,
    reply_tokens: float | None,
    endless: bool,
    seed: int,
    frontend_us: float,
    write_log: Path | None,
    fault: str | None,
    reject_share: float,
    reject_above: int | None,
    reject_status: int,
    slow_start: float,
    grace: float,
) -> None:
    """Serve an LLM that is not there: OpenAI, TGI and TGIS, at modelled times, until Ctrl-C."""
    from llmpilot_simulator.deployment import DeploymentRequest  # noqa: PLC0415 the compiler takes half a second
    from llmpilot_simulator.serving import ServeRequest, serve_until_stopped  # noqa: PLC0415

    serve_until_stopped(
        ServeRequest(
            deployment=DeploymentRequest(
                llm=llm,
                gpu_profile=gpu_profile,
                policy=policy,
                max_batch_weight=max_batch_weight,
                precision=precision,
                context_length=context_length,
                gpus=gpus,
            ),
            http_address=http_address,
            grpc_address=grpc_address,
            fixed_ttft_ms=fixed_ttft_ms,
            fixed_itl_ms=fixed_itl_ms,
            reply_tokens=reply_tokens,
            endless=endless,
            seed=seed,
            frontend_us=frontend_us,
            write_log=write_log,
            fault=fault,
            reject_share=reject_share,
            reject_above=reject_above,
            reject_status=reject_status,
            slow_start_seconds=slow_start,
            grace_seconds=grace,
        )
    )
