"""The ranks of a tensor-parallel LLM, each in a process of its own on this machine.

Invariant: until it meets the others a rank is alone, so that loading and warming up need nobody.
"""

from datetime import timedelta
from pathlib import Path
from typing import Any

import torch.distributed

_LIMIT = timedelta(hours=1)
"""Longer than any prober waits: it is the prober that gives up, and says so."""


class Ranks:
    """A `Collective` over torch.distributed."""

    def __init__(self, backend: str, *, rank: int, rank_count: int, folder: Path) -> None:
        self._backend = backend
        self._rank = rank
        self._rank_count = rank_count
        self._folder = folder
        self._has_met = False

    def meet(self, name: str) -> None:
        """Wait for the other ranks at a place that nobody has met at before."""
        if self._rank_count == 1:
            return
        torch.distributed.init_process_group(
            self._backend,
            init_method=(self._folder / name).resolve().as_uri(),
            rank=self._rank,
            world_size=self._rank_count,
            timeout=_LIMIT,
        )
        self._has_met = True
        self.barrier()

    def all_reduce(self, tensor: Any) -> None:
        """Sum the tensor over all ranks, in place."""
        if self._has_met:
            torch.distributed.all_reduce(tensor)

    def barrier(self) -> None:
        """Wait until every rank is here."""
        if self._has_met:
            torch.distributed.barrier()
