"""Makes models of files that clients send or name: the file in a folder of its own, the fit in a thread.

Invariant: whatever ends a creation, its file is removed and its thread has stopped reading it.
"""

import asyncio
import tempfile
import threading
from collections.abc import AsyncIterator, Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import asynccontextmanager, contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TypeVar

from llmpilot_contracts.errors import InvalidInputError, PreconditionError, UnavailableError, Violation
from llmpilot_workload_generator.files.model_file import SUFFIX, read_model
from llmpilot_workload_generator.fitting.fit import FitOptions, fit
from llmpilot_workload_generator.imports.model_import import import_model
from llmpilot_workload_generator.model import Arrivals, WorkloadModel
from llmpilot_workload_generator.sampling.arrivals import arrival_violations
from llmpilot_workload_generator.traces.reader import open_trace

MODEL_SUFFIXES = (SUFFIX, ".pkl")
"""Of files that are models, and not traces that one is fitted to."""
LARGEST_MODEL_FILE_BYTES = 512 * 1024 * 1024
"""It is read at once, other than a trace."""
_SPEC_FIELDS = ("keep_replay", "parameters")
T = TypeVar("T")
Advance = Callable[[int, int | None], None]


@dataclass(frozen=True, slots=True, kw_only=True)
class Recipe:
    """How a model is made; checked, except that the file may not be there."""

    model_id: str
    mounted_path: str
    """Below the folder of traces; empty: the client sends the file."""
    file_name: str
    file_size_bytes: int
    """Of the file that the client sends."""
    format_name: str | None
    parameters: tuple[str, ...]
    max_bins: int
    source: str
    keep_replay: bool
    arrivals: Arrivals | None


class Creations:
    """The models in the making, a few at once."""

    def __init__(self, *, traces: Path | None, max_count: int, max_upload_bytes: int, idle_seconds: float) -> None:
        self._traces = traces
        self._max_count = max_count
        self._max_upload_bytes = max_upload_bytes
        self._idle_seconds = idle_seconds
        self._count = 0
        self._threads = ThreadPoolExecutor(max_count, "creation")

    async def make(self, recipe: Recipe, chunks: AsyncIterator[bytes]) -> WorkloadModel:
        """Return the model of a mounted file, or of the chunks; raises InvalidInputError where they are none.

        UnavailableError: as many as are allowed are being made.
        """
        with self._slot():
            if recipe.mounted_path:
                return await self._run(lambda advance: self._make_of_mounted(recipe, advance))
            self._check_size(recipe)
            async with _upload_folder(recipe) as folder:
                path = folder / recipe.file_name
                await self._receive(recipe, chunks, path)
                return await self._run(lambda advance: make_model(path, recipe, advance, root=path.parent))

    async def in_time(self, messages: AsyncIterator[T]) -> T | None:
        """Return the next message of a client, None after the last; PreconditionError: it sends nothing."""
        try:
            async with asyncio.timeout(self._idle_seconds):
                return await anext(messages, None)
        except TimeoutError as error:
            raise PreconditionError(f"nothing came for {self._idle_seconds:g} s: send the file again") from error

    @contextmanager
    def _slot(self) -> Iterator[None]:
        if self._count >= self._max_count:
            raise UnavailableError(f"{self._count} models are being made, which is the most at once: try again")
        self._count += 1
        try:
            yield
        finally:
            self._count -= 1

    def _check_size(self, recipe: Recipe) -> None:
        is_model = Path(recipe.file_name).suffix in MODEL_SUFFIXES
        most_bytes = min(self._max_upload_bytes, LARGEST_MODEL_FILE_BYTES) if is_model else self._max_upload_bytes
        if recipe.file_size_bytes > most_bytes:
            raise InvalidInputError(
                [Violation("spec.file_size_bytes", f"must be at most {most_bytes}, is {recipe.file_size_bytes}")]
            )

    async def _receive(self, recipe: Recipe, chunks: AsyncIterator[bytes], path: Path) -> None:
        received_bytes = 0
        try:
            with path.open("xb") as file:
                while (chunk := await self.in_time(chunks)) is not None:
                    received_bytes += len(chunk)
                    if received_bytes > recipe.file_size_bytes:
                        break
                    await asyncio.to_thread(file.write, chunk)
        except OSError as error:
            raise _cannot_be_kept(recipe, error) from error
        if received_bytes != recipe.file_size_bytes:
            more = "more" if received_bytes > recipe.file_size_bytes else f"only {received_bytes}"
            raise InvalidInputError(
                [Violation("spec.file_size_bytes", f"is {recipe.file_size_bytes}, but {more} bytes came")]
            )

    async def _run(self, work: Callable[[Advance], T]) -> T:
        """Run in a thread; when the call is cancelled, have it stop and wait until it has."""
        is_cancelled = threading.Event()

        def advance(done_bytes: int, all_bytes: int | None) -> None:  # noqa: ARG001 nobody watches
            if is_cancelled.is_set():
                raise _StoppedError

        running = asyncio.get_running_loop().run_in_executor(self._threads, work, advance)
        try:
            return await asyncio.shield(running)
        except asyncio.CancelledError:
            is_cancelled.set()
            await asyncio.wait([running])
            running.exception()  # known: it was stopped
            raise

    def _make_of_mounted(self, recipe: Recipe, advance: Advance) -> WorkloadModel:
        path = find_mounted(self._traces, recipe.mounted_path)
        return make_model(path, recipe, advance, root=path.parent)


@asynccontextmanager
async def _upload_folder(recipe: Recipe) -> AsyncIterator[Path]:
    """Give a folder for a client's file. It is removed in a thread, as gigabytes take a while."""
    try:
        folder = tempfile.TemporaryDirectory(prefix="llmpilot-upload-", ignore_cleanup_errors=True)
    except OSError as error:
        raise _cannot_be_kept(recipe, error) from error
    try:
        yield Path(folder.name)
    finally:
        await asyncio.to_thread(folder.cleanup)


def _cannot_be_kept(recipe: Recipe, error: OSError) -> UnavailableError:
    return UnavailableError(f"{recipe.file_name} cannot be kept while it is read: {error.strerror}: try again")


class _StoppedError(Exception):
    """Nobody waits for the model any more."""


def make_model(path: Path, recipe: Recipe, advance: Advance, *, root: Path) -> WorkloadModel:
    """Return the model in a file, or fitted to it; raises InvalidInputError that names files below `root` only."""
    try:
        return _imported(path, recipe) if path.suffix in MODEL_SUFFIXES else _fitted(path, recipe, advance)
    except InvalidInputError as error:
        raise InvalidInputError(_as_client_sees(violation, root) for violation in error.violations) from error


def _imported(path: Path, recipe: Recipe) -> WorkloadModel:
    model = read_model(path) if path.suffix == SUFFIX else import_model(path)
    arrivals = recipe.arrivals or model.arrivals
    if violations := arrival_violations(arrivals, None if model.replay is None else model.replay.arrival_nanos):
        raise InvalidInputError(Violation(f"spec.{each.field}", each.description) for each in violations)
    provenance = replace(model.provenance, source=recipe.source or model.provenance.source)
    return replace(model, provenance=provenance, arrivals=arrivals)


def _fitted(path: Path, recipe: Recipe, advance: Advance) -> WorkloadModel:
    trace = open_trace(path, format_name=recipe.format_name, parameters=recipe.parameters)
    options = FitOptions(
        max_bins=recipe.max_bins,
        keep_replay=recipe.keep_replay,
        source=recipe.source,
        arrivals=recipe.arrivals or Arrivals(),
    )
    return fit(trace, options, advance=advance)


def _as_client_sees(violation: Violation, root: Path) -> Violation:
    field = violation.field.replace(f"{root}/", "")
    return Violation(f"spec.{field}" if field in _SPEC_FIELDS else field, violation.description.replace(f"{root}/", ""))


def find_mounted(traces: Path | None, name: str) -> Path:
    """Return the file or folder of this name below the folder of traces.

    Raises InvalidInputError where there is none, or where it, or a link in it, leads out of the folder.
    """
    if traces is None:
        raise InvalidInputError([_path_violation("needs a service that was given a folder of traces; send the file")])
    root = traces.resolve()
    try:
        path = (root / name).resolve(strict=True)
    except (OSError, ValueError, RuntimeError):  # not there, a zero byte, links in a circle
        path = None
    if path is None or not path.is_relative_to(root):
        raise InvalidInputError([_path_violation(f"must name what is there, below the folder of traces, is {name!r}")])
    for inner in path.rglob("*") if path.is_dir() else ():
        if inner.is_symlink() and not inner.resolve().is_relative_to(root):
            raise InvalidInputError(
                [_path_violation(f"must not lead out of the folder of traces, as {inner.relative_to(path)} does")]
            )
    return path


def _path_violation(description: str) -> Violation:
    return Violation("spec.path", description)
