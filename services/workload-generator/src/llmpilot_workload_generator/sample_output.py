"""Sampled requests as a file or on the terminal, in batches, so that any number of them fits in memory.

Invariant: a file is there whole or not at all.
"""

import errno
import json
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import closing, contextmanager, nullcontext
from dataclasses import dataclass
from itertools import chain
from pathlib import Path
from typing import BinaryIO, Protocol, cast

import pyarrow as pa
import pyarrow.csv as pa_csv
import pyarrow.parquet as pq

from llmpilot_contracts.errors import InvalidInputError, PreconditionError, Violation
from llmpilot_servicekit.file_output import written_whole
from llmpilot_servicekit.progress import shown_progress
from llmpilot_workload_generator.prompts.corpus import read_corpus
from llmpilot_workload_generator.prompts.prompt_cutting import draw_for_prompts
from llmpilot_workload_generator.prompts.rendering import RenderedRequest, Renderer, RenderOptions
from llmpilot_workload_generator.prompts.request_bodies import Server
from llmpilot_workload_generator.prompts.tokenizer import read_tokenizer
from llmpilot_workload_generator.sampling.sampler import Sample, Sampler

_SHORT_PROMPTS = 1_024
"""Requests whose prompts are there before anybody asks for progress."""
SUFFIXES = (".csv", ".jsonl", ".parquet")
BATCH_REQUESTS = 65_536


@dataclass(frozen=True, slots=True, kw_only=True)
class Rendering:
    """How prompts are made."""

    seed: int
    tokenizer: Path | None
    corpus: Path | None
    shared_prefix_ratio: float
    prefix_group_count: int
    server: str | None
    served_model: str


class _Writer(Protocol):
    def write(self, table: pa.Table) -> None: ...
    def close(self) -> None: ...


def violations(out: Path | None, *, prompts: bool) -> list[Violation]:
    """Say what is wrong with the name of an output file."""
    allowed = (".jsonl",) if prompts else SUFFIXES
    if out is not None and out.suffix not in allowed:
        return [Violation("--out", f"must end in {', '.join(allowed)}, is {out.name}")]
    return []


def option_violations(rendering: Rendering, *, prompts: bool) -> list[Violation]:
    """Say which options for prompts would do nothing."""
    is_shared = rendering.shared_prefix_ratio != 0
    wants_model = rendering.server in {Server.OPENAI_COMPLETIONS, Server.OPENAI_CHAT}
    checked = (
        ("--tokenizer", rendering.tokenizer is not None, prompts, "--prompts or --server"),
        ("--corpus", rendering.corpus is not None, prompts, "--prompts or --server"),
        ("--shared-prefix-ratio", is_shared, prompts, "--prompts or --server"),
        ("--prefix-groups", rendering.prefix_group_count != 1, prompts and is_shared, "--shared-prefix-ratio"),
        ("--served-model", bool(rendering.served_model), wants_model, "--server openai-completions or openai-chat"),
    )
    return [Violation(name, f"goes with {other}") for name, is_given, is_used, other in checked if is_given > is_used]


def write_samples(
    sampler: Sampler,
    *,
    start: int,
    count: int,
    out: Path | None,
    renderer: Renderer | None,
    parameters: Sequence[str] = (),
) -> None:
    """Draw and write requests, fewer at the end of a replay; `parameters`: those to write, none: all."""
    last = start + count
    if sampler.request_count is not None and last > sampler.request_count:
        last = sampler.request_count
        if last <= start:
            raise InvalidInputError([Violation("--start", f"must be < {last}, the requests to replay, is {start}")])
        sys.stderr.write(f"the replay ends after {last - start:,} of {count:,} requests\n")
    suffix = out.suffix if out else (".jsonl" if renderer else ".csv")
    is_long = last - start > (_SHORT_PROMPTS if renderer else BATCH_REQUESTS)
    progress = shown_progress("requests drawn") if is_long else nullcontext(_unseen)
    with progress as advance, written_whole(out) if out else _standard_output() as file:
        samples = _samples(sampler, start, last, for_prompts=renderer is not None)
        if renderer:
            for sample in samples:
                file.writelines(map(_prompt_line, renderer.render(sample)))
                advance(sample.start + len(sample) - start, last - start)
        else:
            tables = (_table(sample, parameters) for sample in samples)
            _write_tables(tables, file, suffix, advance=lambda done: advance(done, last - start))
        file.flush()
    if out:
        sys.stderr.write(f"{last - start:,} requests written to {out}\n")


def _unseen(done: int, total: int | None) -> None:
    """Short work needs no progress."""


@contextmanager
def _standard_output() -> Iterator[BinaryIO]:
    try:
        yield sys.stdout.buffer
        sys.stdout.flush()
    except OSError as error:
        if error.errno == errno.EPIPE:  # whoever read, `head` for one, has enough
            raise
        raise PreconditionError(f"the output cannot be written: {error.strerror}") from error


def _samples(sampler: Sampler, start: int, last: int, *, for_prompts: bool) -> Iterator[Sample]:
    while start < last:
        most = last - start
        sample = (
            draw_for_prompts(sampler, start, most) if for_prompts else sampler.draw(start, min(BATCH_REQUESTS, most))
        )
        yield sample
        start += len(sample)


def _table(sample: Sample, parameters: Sequence[str]) -> pa.Table:
    table = sample.to_arrow()
    if not parameters:
        return table
    times = [name for name in table.column_names if name not in sample.columns]
    return table.select([*parameters, *times])


def _write_tables(tables: Iterator[pa.Table], file: BinaryIO, suffix: str, *, advance: Callable[[int], None]) -> None:
    first = next(tables)
    done = 0
    with closing(_writer(file, suffix, first.schema)) as writer:  # before its file is
        for table in chain((first,), tables):
            writer.write(table)
            done += len(table)
            advance(done)


def _writer(file: BinaryIO, suffix: str, schema: pa.Schema) -> _Writer:
    if suffix == ".parquet":
        return cast("_Writer", pq.ParquetWriter(file, schema, compression="zstd"))
    if suffix == ".csv":
        quoting = "none" if all(name.isidentifier() for name in schema.names) else "needed"
        options = pa_csv.WriteOptions(quoting_header=quoting)
        return cast("_Writer", pa_csv.CSVWriter(file, schema, write_options=options))
    return _JsonLines(file)


class _JsonLines:
    """A line per request."""

    def __init__(self, file: BinaryIO) -> None:
        self._file = file

    def write(self, table: pa.Table) -> None:
        self._file.writelines(f"{json.dumps(row)}\n".encode() for row in table.to_pylist())

    def close(self) -> None:
        """Nothing is held back."""


def make_renderer(rendering: Rendering) -> Renderer:
    """Raise InvalidInputError with everything that is wrong."""
    return Renderer(
        RenderOptions(
            tokenizer=read_tokenizer(rendering.tokenizer) if rendering.tokenizer else None,
            corpus=read_corpus(rendering.corpus) if rendering.corpus else None,
            seed=rendering.seed,
            shared_prefix_ratio=rendering.shared_prefix_ratio,
            prefix_group_count=rendering.prefix_group_count,
            server=Server(rendering.server) if rendering.server else None,
            served_model=rendering.served_model,
        )
    )


def _prompt_line(request: RenderedRequest) -> bytes:
    line: dict[str, object] = {
        "index": request.index,
        "prompts": request.prompts,
        "input_tokens": request.input_tokens,
        "output_tokens": request.output_tokens,
    }
    if request.arrival_nanos is not None:
        line["arrival_nanos"] = request.arrival_nanos
    if request.bodies:
        line["bodies"] = [json.loads(body) for body in request.bodies]
    return f"{json.dumps(line, ensure_ascii=False)}\n".encode()
