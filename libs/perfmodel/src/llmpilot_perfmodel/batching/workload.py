"""The requests of a simulated load, checked before compiled code works on them.

Invariant: every request of a workload without violations can be scheduled under its policy.
"""

from collections.abc import Iterator
from typing import NamedTuple

import numpy as np
import numpy.typing as npt

from llmpilot_contracts.errors import InvalidInputError, Violation
from llmpilot_perfmodel.batching.policies import Policy, Vllm1Policy
from llmpilot_perfmodel.batching.state import Integers
from llmpilot_perfmodel.batching.validation import request_violations

_SHOWN_VIOLATIONS = 20


class Workload(NamedTuple):
    """The requests that can be sent."""

    input_tokens: Integers
    output_tokens: Integers
    max_output_tokens: Integers
    hash_starts: Integers
    """Where each request's block hashes begin; one more entry for where the last ones end."""


def read_workload(
    policy: Policy | None,
    *,
    lengths: tuple[npt.ArrayLike, npt.ArrayLike, npt.ArrayLike | None],
    block_hashes: Integers | None,
    block_hash_starts: Integers | None,
    violations: list[Violation],
) -> tuple[Workload, Integers]:
    """Return the requests and all their block hashes; append what is wrong to `violations`.

    policy: None where it is wrong itself, so that nothing can be said about requests under it.
    lengths: input, output and largest output tokens; None: the largest is the real one.
    Raises InvalidInputError where the lengths are not even as many as each other.
    """
    inputs, outputs = whole_numbers("input_tokens", lengths[0]), whole_numbers("output_tokens", lengths[1])
    most = outputs if lengths[2] is None else whole_numbers("max_output_tokens", lengths[2])
    if not 1 <= len(inputs) == len(outputs) == len(most):
        raise InvalidInputError(
            [
                Violation(
                    "input_tokens",
                    f"needs one entry per request, as output_tokens and max_output_tokens; they have "
                    f"{len(inputs)}, {len(outputs)} and {len(most)}",
                )
            ]
        )
    # Copies: a view or a read-only array is another type to the compiler.
    hashes = np.array(() if block_hashes is None else block_hashes, np.int64)
    starts = np.array(np.zeros(len(inputs) + 1) if block_hash_starts is None else block_hash_starts, np.int64)
    if policy is not None:
        violations += _request_violations(policy, inputs, outputs, most)
        violations += _hash_violations(policy, inputs + outputs, hashes, starts)
    workload = Workload(input_tokens=inputs, output_tokens=outputs, max_output_tokens=most, hash_starts=starts)
    return workload, hashes


def whole_numbers(name: str, values: npt.ArrayLike) -> Integers:
    """Return a row of whole numbers; raise InvalidInputError if it is none."""
    array = np.atleast_1d(np.asarray(values))
    if array.ndim != 1 or not np.issubdtype(array.dtype, np.integer):
        raise InvalidInputError([Violation(name, f"must be a row of whole numbers, is {array.dtype} {array.shape}")])
    return array.astype(np.int64)


def _request_violations(policy: Policy, inputs: Integers, outputs: Integers, most: Integers) -> Iterator[Violation]:
    if min(inputs.min(), outputs.min()) >= 1 and (outputs <= most).all():
        longest = (int(inputs.max()), int(outputs.max()), int(most.max()))
        if not [*request_violations(policy, *longest)]:  # nor is any shorter one violated
            return
    shown = 0
    for index, lengths in enumerate(zip(inputs.tolist(), outputs.tolist(), most.tolist(), strict=True)):
        for violation in request_violations(policy, *lengths):
            yield Violation(f"request {index} {violation.field}", violation.description)
            shown += 1
        if shown >= _SHOWN_VIOLATIONS:
            yield Violation("requests", "there may be more; these are the first")
            return


def _hash_violations(policy: Policy, totals: Integers, hashes: Integers, starts: Integers) -> Iterator[Violation]:
    counts = np.diff(starts)
    if starts.shape != (len(totals) + 1,) or starts[0] != 0 or starts[-1] != len(hashes) or (counts < 0).any():
        yield Violation(
            "block_hash_starts",
            f"must rise from 0 to {len(hashes)}, the number of block hashes, in {len(totals) + 1} entries",
        )
    elif isinstance(policy, Vllm1Policy) and (counts > totals // policy.block_size).any():
        index = int(np.argmax(counts > totals // policy.block_size))
        yield Violation(
            "block_hashes",
            f"request {index} has {counts[index]}, more than full blocks in its {totals[index]} tokens",
        )
