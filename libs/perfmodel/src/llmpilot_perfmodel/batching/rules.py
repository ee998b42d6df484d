"""A policy as the numbers that compiled code works with.

Invariant: whatever the caller's numbers are made of, every field has the one type the machine code was compiled for.
"""

from llmpilot_perfmodel.batching.policies import Policy, TgiPolicy, TgisPolicy, Vllm0Policy, Vllm1Policy
from llmpilot_perfmodel.batching.state import TGI, TGIS, VLLM0, VLLM1, Rules


def rules_of(policy: Policy, *, out_of_memory_tokens: int | None) -> Rules:
    """Return the rules of a valid policy."""
    match policy:
        case TgisPolicy():
            rules = Rules(
                kind=TGIS,
                max_batch_size=int(policy.max_batch_size),
                max_weight=int(policy.max_batch_weight),
                max_waiting_tokens=int(policy.max_waiting_tokens),
                is_padded=bool(policy.is_padded),
            )
        case TgiPolicy():
            rules = Rules(
                kind=TGI,
                max_batch_size=int(policy.max_batch_size),
                max_weight=int(policy.max_batch_total_tokens),
                max_waiting_tokens=int(policy.max_waiting_tokens),
                waiting_served_ratio=float(policy.waiting_served_ratio),
                max_prefill_tokens=int(policy.max_batch_prefill_tokens),
            )
        case Vllm0Policy():
            rules = Rules(
                kind=VLLM0,
                max_batch_size=int(policy.max_num_seqs),
                max_prefill_tokens=int(policy.max_num_batched_tokens),
                max_paddings=-1 if policy.max_paddings is None else int(policy.max_paddings),
                block_count=int(policy.block_count),
                block_size=int(policy.block_size),
                watermark_blocks=int(policy.watermark_block_count),
            )
        case Vllm1Policy():
            rules = Rules(
                kind=VLLM1,
                max_batch_size=int(policy.max_num_seqs),
                max_prefill_tokens=int(policy.max_num_batched_tokens),
                block_count=int(policy.block_count),
                block_size=int(policy.block_size),
                has_prefix_cache=bool(policy.enable_prefix_caching),
            )
    return rules._replace(out_of_memory_tokens=int(out_of_memory_tokens or 0))
