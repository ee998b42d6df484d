"""The models there are: named profiles, which are always there, and fitted ones in the JetStream object store.

Invariant: a model that a caller was told of is in the store, and one that was deleted is not given out again, whichever
replica is asked: the store is asked each time, and only a file's content is remembered.
"""

import asyncio
from collections import OrderedDict
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from datetime import timedelta
from functools import cache

from prometheus_client import CollectorRegistry, Counter

from llmpilot_contracts.errors import (
    InvalidInputError,
    NotFoundError,
    PreconditionError,
    UnavailableError,
    Violation,
)
from llmpilot_servicekit.nats_objects import NatsObjects, StoredObject
from llmpilot_workload_generator.files.model_file import model_from_bytes, model_to_bytes
from llmpilot_workload_generator.model import WorkloadModel
from llmpilot_workload_generator.model_summary import ModelSummary, summarize, summary_from_text, summary_to_text
from llmpilot_workload_generator.profiles import PROFILE_NAMES, load_profile, profile_path

KIND = "workload model"
LARGEST_SUMMARY_BYTES = 64 * 1024
"""NATS carries it in one message, and a list has many."""
PAGE_BYTES = 2 * 1024 * 1024
"""Of summaries, after which a page ends; with the last ones it stays below the 4 MiB that gRPC clients take."""
_FOUND_AT_ONCE = 32
CACHE_BYTES = 64 * 1024 * 1024
"""Of model files whose models stay in memory; in memory they take several times as much."""
_SUMMARY, _REQUEST_ID, _SPEC = "summary", "request_id", "spec"


@dataclass(frozen=True, slots=True, kw_only=True)
class StoredModel:
    """A model as a list shows it."""

    model_id: str
    is_profile: bool
    summary: ModelSummary


@dataclass(frozen=True, slots=True, kw_only=True)
class ModelPage:
    """Some models, by name."""

    models: Sequence[StoredModel]
    next_after: str
    """After which name the next page begins; empty: there is none."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Origin:
    """The call that makes a model, by which the same call is recognized when it is repeated."""

    request_id: str
    spec_digest: str

    def to_labels(self) -> Mapping[str, str]:
        """Return what is kept beside the model."""
        return {_REQUEST_ID: self.request_id, _SPEC: self.spec_digest}


class ModelStore:
    """Keeps models. What is not about profiles raises UnavailableError while NATS is away."""

    def __init__(self, objects: NatsObjects, registry: CollectorRegistry) -> None:
        self._objects = objects
        self._cached: OrderedDict[str, tuple[StoredObject, WorkloadModel]] = OrderedDict()
        self._created = Counter("llmpilot_workload_models_created", "Models stored.", registry=registry)
        self._deleted = Counter("llmpilot_workload_models_deleted", "Models deleted.", registry=registry)

    async def find_made(self, model_id: str, origin: Origin) -> StoredModel | None:
        """Return the model that this call has made before; None: it may be made.

        Raises PreconditionError where there is a model of that name which another call made.
        """
        stored = await self._objects.find(model_id)
        if stored is None:
            return None
        if stored.labels.get(_REQUEST_ID) != origin.request_id:
            raise PreconditionError(f"workloadModels/{model_id} already exists: choose another model_id or delete it")
        if stored.labels.get(_SPEC) != origin.spec_digest:
            raise PreconditionError(
                f"request_id {origin.request_id!r} made workloadModels/{model_id} with another specification: "
                "choose another request_id and model_id"
            )
        return _stored_model(stored)

    async def create(self, model_id: str, model: WorkloadModel, origin: Origin) -> StoredModel:
        """Store a model; raises PreconditionError as `find_made` does, also where another replica was faster.

        InvalidInputError: a list could not show it.
        """
        content = await asyncio.to_thread(model_to_bytes, model)
        summary = await asyncio.to_thread(summarize, model, size_bytes=len(content))
        text = summary_to_text(summary)
        if (size_bytes := len(text.encode())) > LARGEST_SUMMARY_BYTES:
            raise InvalidInputError([_summary_violation(size_bytes)])
        labels = {**origin.to_labels(), _SUMMARY: text}
        if not await self._objects.create(model_id, content, labels=labels):
            made = await self.find_made(model_id, origin)
            if made is None:
                raise PreconditionError(f"workloadModels/{model_id} was deleted while it was made: call again")
            return made
        self._created.inc()
        return StoredModel(model_id=model_id, is_profile=False, summary=summary)

    async def get(self, model_id: str) -> StoredModel:
        """Return what a list shows of a model; raises NotFoundError."""
        if model_id in PROFILE_NAMES:
            return await asyncio.to_thread(_profile, model_id)
        return _stored_model(await self._find(model_id))

    async def load(self, model_id: str) -> WorkloadModel:
        """Return a model; raises NotFoundError."""
        if model_id in PROFILE_NAMES:
            return await asyncio.to_thread(_profile_model, model_id)
        stored = await self._find(model_id)
        cached = self._cached.get(model_id)
        if cached is not None and cached[0].id == stored.id:
            self._cached.move_to_end(model_id)
            return cached[1]
        content = await self._objects.read(stored)
        if content is None:
            raise _not_found(model_id)
        model = await asyncio.to_thread(model_from_bytes, content, label=model_id)
        self._cached[model_id] = (stored, model)
        while len(self._cached) > 1 and sum(each.size_bytes for each, _ in self._cached.values()) > CACHE_BYTES:
            self._cached.popitem(last=False)
        return model

    async def list_page(self, *, after: str, count: int) -> ModelPage:
        """Return the next models after this name, at most `count`, fewer where they are large."""
        stored = await self._objects.names()
        names = sorted(name for name in {*stored, *PROFILE_NAMES} if name > after)
        models: list[StoredModel] = []
        taken_count = size_bytes = 0
        while taken_count < min(count, len(names)) and size_bytes < PAGE_BYTES:
            some = names[taken_count : min(taken_count + _FOUND_AT_ONCE, count)]
            taken_count += len(some)
            found = await self._objects.find_all(name for name in some if name not in PROFILE_NAMES)
            size_bytes += sum(len(each.labels.get(_SUMMARY, "").encode()) for each in found)
            models += [_stored_model(each) for each in found if _is_model(each)]
            models += [await asyncio.to_thread(_profile, name) for name in some if name in PROFILE_NAMES]
        return ModelPage(
            models=sorted(models, key=lambda model: model.model_id),
            next_after=names[taken_count - 1] if len(names) > taken_count else "",
        )

    async def delete(self, model_id: str) -> None:
        """Delete a model; raises NotFoundError, and PreconditionError for a profile."""
        if model_id in PROFILE_NAMES:
            raise PreconditionError(f"workloadModels/{model_id} is a named profile, which cannot be deleted")
        await self._objects.delete(await self._find(model_id))
        self._cached.pop(model_id, None)
        self._deleted.inc()

    async def remove_leftovers(self, every: timedelta = timedelta(hours=1)) -> None:
        """For ever, remove what services left in the store that were killed while they wrote a model."""
        while True:
            await asyncio.sleep(every.total_seconds())
            with suppress(UnavailableError):  # the next time, then
                await self._objects.remove_unnamed(idle=every)

    async def _find(self, model_id: str) -> StoredObject:
        stored = await self._objects.find(model_id)
        if stored is None or not _is_model(stored):
            raise _not_found(model_id)
        return stored


def _not_found(model_id: str) -> NotFoundError:
    hint = f"ListWorkloadModels names all; the profiles are {', '.join(PROFILE_NAMES)}"
    return NotFoundError(KIND, f"workloadModels/{model_id}", hint=hint)


def _is_model(stored: StoredObject) -> bool:
    """Whether a service put it there, and nobody by hand."""
    return _SUMMARY in stored.labels


def _summary_violation(size_bytes: int) -> Violation:
    description = (
        f"have names and categories of {size_bytes:,} bytes together, more than the {LARGEST_SUMMARY_BYTES:,} "
        "that a list shows: leave out those with long names or categories"
    )
    return Violation("spec.parameters", description)


def _stored_model(stored: StoredObject) -> StoredModel:
    return StoredModel(model_id=stored.name, is_profile=False, summary=summary_from_text(stored.labels[_SUMMARY]))


@cache
def _profile_model(name: str) -> WorkloadModel:
    return load_profile(name)


@cache
def _profile(name: str) -> StoredModel:
    summary = summarize(_profile_model(name), size_bytes=profile_path(name).stat().st_size)
    return StoredModel(model_id=name, is_profile=True, summary=summary)
