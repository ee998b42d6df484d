"""The options that say what is deployed, the same for every subcommand."""

from collections.abc import Callable
from pathlib import Path

import click

POLICIES = "tgis, tgi, vllm-0.2, vllm"

Callback = Callable[..., None]

_OPTIONS = (
    click.option("--llm", required=True, help="A bundled LLM, a config.json, or a folder that holds one."),
    click.option("--policy", default="tgis", show_default=True, help=f"The server's: {POLICIES}."),
    click.option(
        "--max-batch-weight",
        type=int,
        help="Of the batch: tokens; in TGIS without flash attention requests x longest^2.  "
        "[default: the most that is safe, or one request of 1,255 tokens]",
    ),
    click.option(
        "--precision", help="Of the weights: fp32, fp16, bf16, fp8, int8, int4.  [default: the config.json's]"
    ),
    click.option("--gpus", type=click.Path(path_type=Path), help="A CSV file of GPU types to add to the catalogue."),
)


def deployment_options(callback: Callback) -> Callback:
    """Add the options to a command's function."""
    for option in reversed(_OPTIONS):
        callback = option(callback)
    return callback
