"""How inference servers count the weight of a batch, and what of it costs memory.

Sources: TGIS router/src/{batch_types,queue}.rs before paged attention, January 2024; TGI 3 backends/v3; vLLM V1.
"""

from dataclasses import dataclass
from enum import StrEnum

from llmpilot_perfmodel.batching.policies import WeightDefinition
from llmpilot_perfmodel.step_memory.batch import Layout


class Server(StrEnum):
    """Inference servers whose maximum batch weight can be tuned."""

    TGIS = "tgis"
    """IBM's Text Generation Inference Server as the paper ran it, in January 2024."""
    TGI = "tgi"
    VLLM = "vllm"


class PrefillWeight(StrEnum):
    """What a server calls the weight of a prefill of n requests."""

    TOKENS = "tokens"
    PADDED_POWER = "padded-power"
    """n times the longest input to the power of 1.5."""


@dataclass(frozen=True, slots=True, kw_only=True)
class ServerRules:
    """What decides which batches a server makes, and what they cost."""

    server: Server
    weight_definition: WeightDefinition
    prefill_weight: PrefillWeight
    layout: Layout
    block_size: int
    """Tokens that the cache is given out by; 1: there are no pages."""
    chunks_prefills: bool
    """Whether a step reads a part of a long input, beside the decode steps of other requests."""
    extra_caches: int
    """How often the whole cache lies in memory once more while the server copies it."""
    merges_batches: bool
    """Whether the cache of new requests is concatenated with that of the others."""
    default_prefill_limit: int | None
    """Most weight of one prefill where nothing else is said; None: a prefill may be as large as the batch."""


TGIS_FLASH = ServerRules(
    server=Server.TGIS,
    weight_definition=WeightDefinition.TOKENS,
    prefill_weight=PrefillWeight.TOKENS,
    layout=Layout.PACKED,
    block_size=1,
    chunks_prefills=False,
    extra_caches=2,
    merges_batches=True,
    default_prefill_limit=8192,
)
TGIS_PADDED = ServerRules(
    server=Server.TGIS,
    weight_definition=WeightDefinition.PADDED_SQUARED,
    prefill_weight=PrefillWeight.PADDED_POWER,
    layout=Layout.PADDED,
    block_size=1,
    chunks_prefills=False,
    extra_caches=0,
    merges_batches=True,
    default_prefill_limit=300_000,
)
TGI = ServerRules(
    server=Server.TGI,
    weight_definition=WeightDefinition.TOKENS,
    prefill_weight=PrefillWeight.TOKENS,
    layout=Layout.PACKED,
    block_size=1,
    chunks_prefills=False,
    extra_caches=0,
    merges_batches=False,
    default_prefill_limit=None,
)
TGI_PADDED = ServerRules(
    server=Server.TGI,
    weight_definition=WeightDefinition.TOKENS,
    prefill_weight=PrefillWeight.TOKENS,
    layout=Layout.PADDED,
    block_size=1,
    chunks_prefills=False,
    extra_caches=0,
    merges_batches=True,
    default_prefill_limit=None,
)
VLLM = ServerRules(
    server=Server.VLLM,
    weight_definition=WeightDefinition.TOKENS,
    prefill_weight=PrefillWeight.TOKENS,
    layout=Layout.PACKED,
    block_size=16,
    chunks_prefills=True,
    extra_caches=0,
    merges_batches=False,
    default_prefill_limit=8192,
)


def server_rules(server: Server, *, is_padded: bool) -> ServerRules:
    """Return the rules of a server for an LLM; is_padded: it has no flash attention, or is an encoder-decoder."""
    match server:
        case Server.TGIS:
            return TGIS_PADDED if is_padded else TGIS_FLASH
        case Server.TGI:
            return TGI_PADDED if is_padded else TGI
        case Server.VLLM:
            return VLLM
