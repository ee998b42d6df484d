"""Whether a server with given limits and a maximum batch weight would run a batch.

Invariant: written from the servers' rules alone, and not from the corner cases: tests hold the two against each other.
Where a server's own count is not exact, what is admitted here is more, never less: residents of a server that counts
tokens weigh their own, padded or not, and a prefill limit does not shrink with what lies in the cache, as TGIS's does.
"""

from llmpilot_perfmodel.batching.policies import WeightDefinition
from llmpilot_perfmodel.step_memory.batch import Batch, Layout, Rows
from llmpilot_tuner.domain.limits import Limits


def is_admissible(batch: Batch, limits: Limits, weight: int) -> bool:
    """Return whether the server would run a batch."""
    groups = (*batch.prefill, *batch.decode, *batch.residents)
    return (
        bool(batch.prefill or batch.decode)
        and batch.request_count <= limits.most_requests
        and all(_is_request(rows, limits) for rows in groups)
        and all(rows.output_tokens == 1 for rows in batch.prefill)
        and batch.copied_tokens <= limits.rules.extra_caches * batch.token_count
        and (limits.prompt_logprobs or not batch.all_logits)
        and (_is_chunked_step if limits.rules.chunks_prefills else _is_whole_step)(batch, limits, weight)
    )


def _is_whole_step(batch: Batch, limits: Limits, weight: int) -> bool:
    groups = (*batch.prefill, *batch.decode, *batch.residents)
    if (batch.prefill and batch.decode) or any(rows.context_tokens for rows in groups):
        return False
    if limits.rules.layout is Layout.PADDED:
        fits = batch.pool_tokens == 0 and _padded_weight(batch, limits) <= weight
    else:
        fits = batch.pool_tokens == weight and batch.token_count <= weight
    return fits and _is_prefill(batch.prefill, limits)


def _is_request(rows: Rows, limits: Limits) -> bool:
    return (
        rows.request_count >= 1
        and rows.input_tokens >= 1
        and rows.context_tokens >= 0
        and 1 <= rows.output_tokens <= limits.most_new_tokens
        and rows.sequence_tokens <= limits.longest_sequence
    )


def _is_chunked_step(batch: Batch, limits: Limits, weight: int) -> bool:
    size = limits.rules.block_size
    tokens = batch.prefill_tokens + sum(rows.request_count for rows in batch.decode)
    groups = (*batch.prefill, *batch.decode, *batch.residents)
    blocks = sum(rows.request_count * -(-rows.sequence_tokens // size) for rows in groups)
    pool = weight // size
    limit = pool * size if limits.prefill_limit is None else limits.prefill_limit
    return tokens <= limit and blocks <= pool and batch.pool_tokens == pool * size


def _is_prefill(prefill: tuple[Rows, ...], limits: Limits) -> bool:
    if not prefill or limits.prefill_limit is None:
        return True
    count = sum(rows.request_count for rows in prefill)
    if limits.rules.layout is Layout.PACKED:
        return sum(rows.request_count * rows.input_tokens for rows in prefill) <= limits.prefill_limit
    return limits.prefill_weight(count, max(rows.input_tokens for rows in prefill)) <= limits.prefill_limit


def _padded_weight(batch: Batch, limits: Limits) -> int:
    """Return the weight of rectangles, as wide as the longest input and the longest output."""
    step = batch.prefill or batch.decode
    definition = limits.rules.weight_definition
    count, width = sum(rows.request_count for rows in step), _width(step, limits)
    if definition is WeightDefinition.TOKENS:
        return definition.weight(count, width) + sum(rows.token_count for rows in batch.residents)
    if batch.residents:
        width = max(width, _width(batch.residents, limits))
    return definition.weight(batch.request_count, width)


def _width(groups: tuple[Rows, ...], limits: Limits) -> int:
    if limits.is_encoder_decoder:
        return max(rows.input_tokens for rows in groups) + max(rows.output_tokens for rows in groups)
    return max(rows.sequence_tokens for rows in groups)
