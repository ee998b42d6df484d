"""What a tuning is asked to do.

Invariant: a spec says everything that its result depends on, but for the machine it runs on.
"""

from dataclasses import dataclass, field
from pathlib import Path

from llmpilot_tuner.domain.probing import ProbeKind
from llmpilot_tuner.domain.servers import Server

DEFAULT_PRECISION = 0.01
DEFAULT_STEP_SECONDS = 120.0
DEFAULT_SOAK_STEPS = 50


@dataclass(frozen=True, slots=True, kw_only=True)
class ServerTarget:
    """The inference server of a `server` probe: one that runs, or a command that starts it."""

    url: str
    """http(s) for vLLM's OpenAI API and for TGI, grpc for TGIS."""
    command: tuple[str, ...] = ()
    """Starts the server; "{weight}" and the names of its settings' files in braces are filled in. Empty: it runs."""
    log_file: Path | None = None
    """Of a server that runs: where it writes its log, if that can be read here."""
    start_seconds: float = 600.0


@dataclass(frozen=True, slots=True, kw_only=True)
class TuningSpec:
    """One LLM on one GPU profile, the limits of the server, and how to find out."""

    config_json: str = field(repr=False)
    """The text of the LLM's config.json."""
    llm_name: str = ""
    model_folder: Path | None = None
    """Real weights; None: random ones, which take the same memory."""
    probe: ProbeKind = ProbeKind.ANALYTIC
    server: Server = Server.TGIS
    gpu_name: str = ""
    """The GPU type of the catalogue that is meant, or empty."""
    gpu_count: int = 1
    """GPUs per pod: tensor parallelism."""
    gpu_memory_bytes: int
    """Of one GPU, what the system says that there is."""
    reserved_bytes: int
    """Of one GPU, what is not for tensors: CUDA context, kernels, workspaces, buffers of collectives."""
    precision_name: str = ""
    """Of weights and activations: "fp32", "fp16", "bf16"; empty: what config.json says."""
    eager_attention: bool = False
    longest_sequence: int
    most_new_tokens: int
    most_requests: int
    prefill_limit: int | None = None
    """None: the server's default."""
    prompt_logprobs: bool = False
    granule: int = 1
    """Weights are multiples of it."""
    precision: float = DEFAULT_PRECISION
    """How far below the largest safe weight the one found may be, as a share of it."""
    step_seconds: float = DEFAULT_STEP_SECONDS
    """A step that takes longer is given up."""
    soak_steps: int = DEFAULT_SOAK_STEPS
    """Steps of the final verdict, in random order."""
    seed: int = 0
    target: ServerTarget | None = None

    @property
    def goes_on_from_probes(self) -> bool:
        """Whether probes that were made before count: a server has to be brought into its corner cases again."""
        return self.probe is not ProbeKind.SERVER

    @property
    def is_repeatable(self) -> bool:
        """Whether the same finds the same again: a server that runs may be another one the next time."""
        return self.target is None or bool(self.target.command)

    @property
    def capacity_bytes(self) -> int:
        """What weights, cache and everything else may have together on each GPU."""
        return self.gpu_memory_bytes - self.reserved_bytes
