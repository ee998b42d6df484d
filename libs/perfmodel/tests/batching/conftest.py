from collections.abc import Callable, Sequence

import numpy as np
import pytest

from llmpilot_perfmodel.batching.engine import Engine
from llmpilot_perfmodel.steps.step_time import StepConstants, StepTables

Drive = Callable[..., list[list[float]]]


def _drive(
    engine: Engine, requests: Sequence[tuple[float, ...]], block_hashes: Sequence[Sequence[int]] | None = None
) -> list[list[float]]:
    tokens: list[list[float]] = [[] for _ in requests]
    owner: dict[int, int] = {}
    now, sent = 0.0, 0
    while True:
        while sent < len(requests) and requests[sent][0] <= now:
            arrival, *lengths = requests[sent]
            most = int(lengths[2]) if len(lengths) > 2 else None
            slot = engine.submit(
                arrival_seconds=arrival,
                input_tokens=int(lengths[0]),
                output_tokens=int(lengths[1]),
                max_output_tokens=most,
                block_hashes=np.array(block_hashes[sent] if block_hashes else (), np.int64),
            )
            assert slot not in owner
            owner[slot] = sent
            sent += 1
        end = engine.start_step(now)
        if end is None:
            if sent == len(requests):
                return tokens
            now = requests[sent][0]
            continue
        outcome = engine.finish_step()
        now = end
        for slot in outcome.token_slots.tolist():
            tokens[owner[slot]].append(now)
        for slot in (*outcome.failed_slots.tolist(), *outcome.finished_slots.tolist()):
            del owner[slot]


@pytest.fixture(scope="session")
def drive() -> Drive:
    """Run an engine on requests (arrival, input, output[, largest output]), sorted by arrival, to the end.

    Returns the token times of each.
    """
    return _drive


@pytest.fixture(scope="session")
def constants() -> StepConstants:
    """Decode: 1 + sequences / 2 seconds; prefill: 2 + tokens / 4 + requests / 2. Exact in binary, so == compares."""
    return StepConstants(
        decode_seconds=1.0,
        decode_seconds_per_sequence=0.5,
        decode_seconds_per_cached_token=0.0,
        prefill_seconds=2.0,
        prefill_seconds_per_token=0.25,
        prefill_seconds_per_request=0.5,
    )


@pytest.fixture(scope="session")
def tables(constants: StepConstants) -> StepTables:
    return constants.tables()
