"""The dataset the recommender learns from: measurements, at most one per (LLM, GPU profile, users).

Invariant: a dataset never changes, and two datasets have the same version exactly when they hold the same rows.
"""

import hashlib
from collections import defaultdict
from collections.abc import Iterable
from functools import cached_property

from llmpilot_contracts.dataset_schema import SCHEMA_VERSION
from llmpilot_contracts.errors import InvalidInputError, Violation
from llmpilot_recommender.measurement import Measurement, canonical_bytes

_VERSION_DIGITS = 12


class Dataset:
    """An immutable set of measurements with a content hash."""

    def __init__(self, measurements: Iterable[Measurement] = ()) -> None:
        self._by_key: dict[tuple[str, str, int], Measurement] = {}
        repeated = []
        for measurement in measurements:
            if measurement.key in self._by_key:
                repeated.append(measurement.key)
            self._by_key[measurement.key] = measurement
        if repeated:
            raise InvalidInputError(
                Violation(f"dataset ({', '.join(map(str, key))})", "must appear once, is repeated") for key in repeated
            )

    def __eq__(self, other: object) -> bool:
        return self.measurements == other.measurements if isinstance(other, Dataset) else NotImplemented

    def __hash__(self) -> int:
        return hash(self.measurements)

    def __len__(self) -> int:
        return len(self._by_key)

    def __repr__(self) -> str:
        return f"Dataset({len(self)} measurements, version {self.version})"

    @cached_property
    def measurements(self) -> tuple[Measurement, ...]:
        """All measurements, ordered by LLM, GPU profile, users."""
        return tuple(self._by_key[key] for key in sorted(self._by_key))

    @cached_property
    def version(self) -> str:
        """Schema version and the first digits of the SHA-256 over the ordered rows of the dataset file."""
        digest = hashlib.sha256()
        for measurement in self.measurements:
            digest.update(canonical_bytes(measurement) + b"\x1e")
        return f"{SCHEMA_VERSION}-{digest.hexdigest()[:_VERSION_DIGITS]}"

    @cached_property
    def llms(self) -> tuple[str, ...]:
        """Names of the LLMs, sorted."""
        return tuple(sorted({measurement.llm for measurement in self._by_key.values()}))

    @cached_property
    def gpu_profiles(self) -> tuple[str, ...]:
        """Names of the GPU profiles, sorted."""
        return tuple(sorted({measurement.gpu_profile for measurement in self._by_key.values()}))

    @cached_property
    def users_counts(self) -> tuple[int, ...]:
        """Measured numbers of concurrent users, ascending."""
        return tuple(sorted({measurement.users_count for measurement in self._by_key.values()}))

    def curve(self, llm: str, gpu_profile: str) -> tuple[Measurement, ...]:
        """Return the measurements of one LLM on one GPU profile, ascending by users; empty if there are none."""
        return self._curves.get((llm, gpu_profile), ())

    def measurement(self, key: tuple[str, str, int]) -> Measurement | None:
        """Return the measurement with this key, if any."""
        return self._by_key.get(key)

    def with_measurement(self, measurement: Measurement) -> "Dataset":
        """Return a dataset with this measurement in place of the one with the same key, if any."""
        return _dataset_of({**self._by_key, measurement.key: measurement})

    @cached_property
    def _curves(self) -> dict[tuple[str, str], tuple[Measurement, ...]]:
        curves = defaultdict(list)
        for measurement in self.measurements:
            curves[measurement.llm, measurement.gpu_profile].append(measurement)
        return {pair: tuple(curve) for pair, curve in curves.items()}


def _dataset_of(by_key: dict[tuple[str, str, int], Measurement]) -> Dataset:
    dataset = Dataset()
    dataset._by_key = by_key
    return dataset
