"""How many requests go into one message with their prompts: a request may have three tokens or a hundred thousand."""

import numpy as np

from llmpilot_contracts.errors import InvalidInputError, Violation
from llmpilot_workload_generator.model import BATCH_SIZE, INPUT_TOKENS
from llmpilot_workload_generator.sampling.sampler import Sample, Sampler

LARGEST_COUNT = 256
LARGEST_PROMPT_TOKENS = 64 * 1024
"""Of all prompts together, some 256 KB of text; one request may have more."""
LARGEST_REQUEST_TOKENS = 8 << 20
"""Of the prompts of one request, some 32 MB of text: 80 prompts of 100,000 tokens."""


def draw_for_prompts(sampler: Sampler, start: int, most: int) -> Sample:
    """Draw as many requests from `start` on, at most `most` and at least one, as fit into a message.

    Raises InvalidInputError where the first one is larger than any that is made.
    """
    sample = sampler.draw(start, min(most, LARGEST_COUNT))
    tokens = np.ones(len(sample))
    for name in (INPUT_TOKENS, BATCH_SIZE):
        column = sample.columns.get(name)
        if column is not None and column.dtype.kind in "if":  # else no prompt can be made, which the renderer says
            tokens = tokens * column.astype(np.float64)
    if len(tokens) and tokens[0] > LARGEST_REQUEST_TOKENS:
        description = (
            f"must be set, or scales be smaller: request {start} has {tokens[0]:,.0f} tokens in its prompts, "
            f"and at most {LARGEST_REQUEST_TOKENS:,} are made"
        )
        raise InvalidInputError([Violation("context_length", description)])
    fitting = max(int(np.searchsorted(np.cumsum(tokens), LARGEST_PROMPT_TOKENS, side="right")), 1)
    return sample if fitting >= len(sample) else sampler.draw(start, fitting)
