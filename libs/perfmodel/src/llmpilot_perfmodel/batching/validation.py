"""What a server and its requests must look like before compiled code works on them.

Invariant: every violation is listed, not the first.
"""

from collections.abc import Iterator

import numpy as np

from llmpilot_contracts.errors import Violation
from llmpilot_perfmodel.batching.policies import LARGEST_COUNT, Policy, fit_violations, policy_violations
from llmpilot_perfmodel.steps.step_time import StepTables

LARGEST_REQUEST_TOKENS = 2**31 - 1
"""Keeps the products of lengths that compiled code makes within 64 bits."""


def server_violations(policy: Policy, tables: StepTables, out_of_memory_tokens: int | None) -> list[Violation]:
    """Return everything that is wrong with a server."""
    violations = [*policy_violations(policy), *_table_violations(tables)]
    if out_of_memory_tokens is not None and not 1 <= out_of_memory_tokens <= LARGEST_COUNT:
        problem = f"must be between 1 and {LARGEST_COUNT}, is {out_of_memory_tokens}; None: never"
        violations.append(Violation("out_of_memory_tokens", problem))
    return violations


def _table_violations(tables: StepTables) -> Iterator[Violation]:
    for name, array in tables._asdict().items():
        if not np.isfinite(array).all():
            yield Violation(f"tables.{name}", "must be finite numbers; fit the step constants again or leave them out")


def request_violations(
    policy: Policy, input_tokens: int, output_tokens: int, max_output_tokens: int
) -> Iterator[Violation]:
    """Yield everything that is wrong with a request, or why it could never be scheduled."""
    lengths_are_right = True
    for name, value in (("input_tokens", input_tokens), ("output_tokens", output_tokens)):
        if not 1 <= value <= LARGEST_REQUEST_TOKENS:
            lengths_are_right = False
            yield Violation(name, f"must be between 1 and {LARGEST_REQUEST_TOKENS}, is {value}")
    if not output_tokens <= max_output_tokens <= LARGEST_REQUEST_TOKENS:
        lengths_are_right = False
        yield Violation(
            "max_output_tokens",
            f"must be between output_tokens {output_tokens} and {LARGEST_REQUEST_TOKENS}, is {max_output_tokens}",
        )
    if lengths_are_right:
        yield from fit_violations(policy, input_tokens, max_output_tokens)
