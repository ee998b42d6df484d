"""The options of `llm-pilot tune`.

Invariant: what was not given is None or empty, so that defaults are chosen in one place, cli_spec.py.
"""

import re
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import click

from llmpilot_tuner.domain.probing import ProbeKind
from llmpilot_tuner.domain.servers import Server
from llmpilot_tuner.domain.spec import DEFAULT_PRECISION, DEFAULT_SOAK_STEPS, DEFAULT_STEP_SECONDS

Callback = Callable[..., None]

_UNITS = {
    "b": 1,
    "kb": 10**3,
    "mb": 10**6,
    "gb": 10**9,
    "tb": 10**12,
    "kib": 2**10,
    "mib": 2**20,
    "gib": 2**30,
    "tib": 2**40,
}
LARGEST_BYTES = 2**50


class Size(click.ParamType[int]):
    """An amount of memory such as 24GiB, 80GB, 300MB; without a unit it would be anybody's guess."""

    name = "size"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> int:
        """Return bytes."""
        if isinstance(value, int):
            return value
        match = re.fullmatch(r"(\d+(?:\.\d+)?|\.\d+)\s*([A-Za-z]*)", str(value).strip())
        unit = match[2].casefold() if match else ""
        if match is None or (unit not in _UNITS and float(match[1]) > 0):
            self.fail(f"{value!r} is no size; write 24GiB (2^30 bytes each), 80GB (10^9 each), 300MB", param, ctx)
        byte_count = round(float(match[1]) * _UNITS.get(unit, 1))
        if byte_count > LARGEST_BYTES:
            self.fail(f"{value!r} is more than any GPU has", param, ctx)
        return byte_count


SIZE = Size()


@dataclass(frozen=True, slots=True, kw_only=True)
class TuneOptions:
    """The options that say what to tune, as they were given; None: not given."""

    config: str | None
    model: Path | None
    probe: str
    gpu: str | None
    gpu_memory: int | None
    gpus: int | None
    reserve: int | None
    server: str
    longest_sequence: int | None
    max_new_tokens: int | None
    max_requests: int | None
    prefill_limit: int | None
    prompt_logprobs: bool
    precision: str | None
    eager_attention: bool
    granule: int
    precision_percent: float
    step_seconds: float
    soak_steps: int
    seed: int
    url: str | None
    start: str | None
    start_seconds: float | None
    server_log: Path | None


_path = click.Path(path_type=Path)
_OPTIONS = (
    click.option("--config", metavar="LLM", help="A config.json, a folder that holds one, or a bundled LLM."),
    click.option("--model", type=_path, help="Folder of the real weights.  [default: random ones, as large]"),
    click.option(
        "--probe",
        type=click.Choice([kind.value for kind in ProbeKind]),
        default=ProbeKind.ANALYTIC.value,
        show_default=True,
        help="How memory is learnt: by formulas; with PyTorch but no memory; on the CPU; on the GPU; with the server.",
    ),
    click.option("--gpu", metavar="PROFILE", help="GPU profile of the catalogue, e.g. 2xA100-40GB."),
    click.option("--gpu-memory", type=SIZE, help="Memory of one GPU, e.g. 24GiB; instead of --gpu."),
    click.option("--gpus", type=int, help="GPUs that the LLM is sharded over; goes with --gpu-memory.  [default: 1]"),
    click.option("--reserve", type=SIZE, help="Of one GPU, what is not for tensors.  [default: as the catalogue says]"),
    click.option(
        "--server",
        type=click.Choice([server.value for server in Server]),
        default=Server.TGIS.value,
        show_default=True,
        help="The server that the weight is for.",
    ),
    click.option(
        "--longest-sequence", type=int, help="Tokens of a request, in and out.  [default: the context, 8192 at most]"
    ),
    click.option(
        "--max-new-tokens", type=int, help="Output tokens of a request.  [default: half of those, 1024 at most]"
    ),
    click.option("--max-requests", type=int, help="Requests in a batch.  [default: 256]"),
    click.option(
        "--prefill-limit", type=int, help="Weight of a prefill, of vLLM tokens of a step.  [default: its own]"
    ),
    click.option("--prompt-logprobs", is_flag=True, help="Requests may ask for log-probabilities of their input."),
    click.option("--precision", help="Of weights and activations: fp16, bf16, fp32.  [default: the config.json's]"),
    click.option("--eager-attention", is_flag=True, help="The server computes attention without a fused kernel."),
    click.option("--granule", type=int, default=1, show_default=True, help="Weights are multiples of it."),
    click.option(
        "--precision-percent",
        type=float,
        default=100 * DEFAULT_PRECISION,
        show_default=True,
        help="How far below the largest safe weight the one found may be.",
    ),
    click.option(
        "--step-seconds",
        type=float,
        default=DEFAULT_STEP_SECONDS,
        show_default=True,
        help="A step that takes longer is given up.",
    ),
    click.option(
        "--soak-steps",
        type=int,
        default=DEFAULT_SOAK_STEPS,
        show_default=True,
        help="Steps of the final verdict, in random order.",
    ),
    click.option("--seed", type=int, default=0, show_default=True, help="Of that order, and of random weights."),
    click.option("--url", help="Of --probe server: where it serves, e.g. http://HOST:8000, grpc://HOST:8033."),
    click.option(
        "--start", metavar="COMMAND", help='Starts that server; "{weight}" stands for the weight. Else it runs.'
    ),
    click.option("--start-seconds", type=float, help="How long it may take to answer then.  [default: 600]"),
    click.option("--server-log", type=_path, help="Log of a server that runs, if it can be read here."),
)


def tune_options(callback: Callback) -> Callback:
    """Add the options to a command's function."""
    for option in reversed(_OPTIONS):
        callback = option(callback)
    return callback
