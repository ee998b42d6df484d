"""Samples -> requests: prompts of exactly the asked number of tokens, sampling parameters and bodies.

Invariant: request `index` is a function of the options and of its sample alone. No two prompts begin with the same 16
tokens unless the options or the trace say that they share a beginning.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from llmpilot_contracts.errors import InvalidInputError, Violation
from llmpilot_workload_generator.model import BATCH_SIZE, INPUT_TOKENS, OUTPUT_TOKENS, Columns, Integers, Keys
from llmpilot_workload_generator.prompts.corpus import default_corpus
from llmpilot_workload_generator.prompts.prefix_sharing import BlockTexts, SharedTexts
from llmpilot_workload_generator.prompts.prompt_text import PROMPT_STREAM, PromptWriter, numbers_of, prepared_writer
from llmpilot_workload_generator.prompts.request_bodies import BodyWriter, Server
from llmpilot_workload_generator.prompts.sampling_parameters import SamplingParameters, read_sampling
from llmpilot_workload_generator.prompts.tokenizer import Tokenizer, default_tokenizer, read_tokenizer
from llmpilot_workload_generator.sampling.random_stream import LARGEST_SEED
from llmpilot_workload_generator.sampling.sampler import Sample

SEQUENCE_BITS = 16
INDEX_BITS = 48
"""A prompt's number is its request's index and its place in the batch."""
LARGEST_BATCH_SIZE = 1 << SEQUENCE_BITS
LARGEST_TOKENS = 1 << 24
LARGEST_GROUP_COUNT = 100_000
_ROUNDING = 1e-9
"""0.29 * 100 is 28.999999999999996."""
_NEEDS_MODEL_NAME = (Server.OPENAI_COMPLETIONS, Server.OPENAI_CHAT)


@dataclass(frozen=True, slots=True, kw_only=True)
class RenderOptions:
    """What requests are made of."""

    tokenizer: Tokenizer | Path | None = None
    """That of the server's LLM, as a tokenizer.json or its folder; None: the default one."""
    corpus: str | None = None
    """The text to cut prompts from; None: the default one."""
    seed: int = 0
    shared_prefix_ratio: float = 0.0
    """From 0 to 1: the share of a prompt that all requests of its group begin with."""
    prefix_group_count: int = 1
    """Request `index` is of group `index` modulo this."""
    server: Server | None = None
    """None: no bodies."""
    served_model: str = ""
    """The name of the LLM at the server, for OpenAI's endpoints."""
    fixed_output_length: bool = True
    """Ask for exactly the output tokens of the sample, where the server can be asked."""


@dataclass(frozen=True, slots=True, kw_only=True)
class RenderedRequest:
    """A request, ready to be sent."""

    index: int
    prompts: tuple[str, ...]
    """One per sequence of the batch."""
    input_tokens: int
    """Of each prompt, with those that the tokenizer adds."""
    output_tokens: int
    sampling: SamplingParameters
    arrival_nanos: int | None
    bodies: tuple[bytes, ...]
    """One for all prompts, or one for each, as the server takes them; empty without a server and for TGIS."""
    shared_prefix_tokens: int
    """How many of the first tokens are those of its group or of the trace's blocks."""


class Renderer:
    """Renders samples, for one thread at a time.

    The first one of a tokenizer and a corpus takes seconds, as the one is tried on the other.
    """

    def __init__(self, options: RenderOptions) -> None:
        """Raise InvalidInputError with everything that is wrong; PreconditionError where the tokenizer does not do."""
        if violations := list(_violations(options)):
            raise InvalidInputError(violations)
        tokenizer = options.tokenizer or default_tokenizer()
        self.tokenizer = read_tokenizer(tokenizer) if isinstance(tokenizer, Path) else tokenizer
        corpus = default_corpus() if options.corpus is None else options.corpus
        self._options = options
        self._writer = prepared_writer(self.tokenizer, corpus)
        self._texts = _Texts(self._writer, self.tokenizer, options)
        self._bodies = options.server and BodyWriter(
            options.server, served_model=options.served_model, fixed_output_length=options.fixed_output_length
        )

    def render(self, sample: Sample) -> list[RenderedRequest]:
        """Render requests; raises InvalidInputError where a model lacks what a request needs."""
        plan = _Plan(sample, self.tokenizer)
        sampling = read_sampling(sample.columns, plan.count)
        prompts, shared = self._texts.prompts(plan)
        ends = np.cumsum(plan.batch_sizes).tolist()
        arrivals = [None] * plan.count if sample.arrival_nanos is None else sample.arrival_nanos.tolist()
        write = self._bodies.write if self._bodies else None
        requests = []
        begin = 0
        rows = zip(
            ends, plan.input_tokens.tolist(), plan.output_tokens.tolist(), sampling, arrivals, shared, strict=True
        )
        for index, (end, inputs, outputs, parameters, arrival, shared_tokens) in enumerate(rows, sample.start):
            texts = tuple(prompts[begin:end])
            begin = end
            requests.append(
                RenderedRequest(
                    index=index,
                    prompts=texts,
                    input_tokens=inputs,
                    output_tokens=outputs,
                    sampling=parameters,
                    arrival_nanos=arrival,
                    bodies=write(texts, parameters, outputs) if write else (),
                    shared_prefix_tokens=shared_tokens,
                )
            )
        return requests


class _Plan:
    """What a sample asks for, checked."""

    def __init__(self, sample: Sample, tokenizer: Tokenizer) -> None:
        columns = sample.columns
        if missing := [name for name in (INPUT_TOKENS, OUTPUT_TOKENS) if name not in columns]:
            raise InvalidInputError(
                Violation("model", f"must have the parameter {name} to make requests, has {', '.join(columns)}")
                for name in missing
            )
        violations: list[Violation] = []
        self.count = len(columns[INPUT_TOKENS])
        self.input_tokens = _whole(columns, INPUT_TOKENS, tokenizer.special_count + 1, LARGEST_TOKENS, violations)
        self.output_tokens = _whole(columns, OUTPUT_TOKENS, 1, LARGEST_TOKENS, violations)
        self.batch_sizes = np.ones(self.count, np.int64)
        if BATCH_SIZE in columns:
            self.batch_sizes = _whole(columns, BATCH_SIZE, 1, LARGEST_BATCH_SIZE, violations)
        if not 0 <= sample.start <= (1 << INDEX_BITS) - self.count:
            violations.append(Violation("start", f"must be from 0 to 2^{INDEX_BITS}, is {sample.start}"))
        if violations:
            raise InvalidInputError(violations)
        self.indexes = sample.start + np.arange(self.count)
        self.blocks: tuple[Integers, Integers, int] | None = None
        ids, starts, block_tokens = sample.prefix_ids, sample.prefix_starts, sample.prefix_block_tokens
        if ids is not None and starts is not None and len(ids) and block_tokens:
            self.blocks = ids, starts, block_tokens


def _whole(columns: Columns, name: str, least: int, most: int, violations: list[Violation]) -> Integers:
    column = columns[name]
    if column.dtype.kind not in "iuf":
        violations.append(Violation(name, "must be a column of numbers, is one of text"))
        return np.zeros(len(column), np.int64)
    values = np.rint(column.astype(np.float64)).astype(np.int64)
    if (wrong := (values < least) | (values > most)).any():
        hint = f" ({least - 1} are the tokenizer's own)" if name == INPUT_TOKENS and least > 1 else ""
        violations.append(
            Violation(
                name,
                f"must be from {least}{hint} to {most}, is {values[wrong][0]} "
                f"in {int(wrong.sum())} of {len(values)} requests; conditions leave such requests out",
            )
        )
    return values


class _Texts:
    """Puts prompts together."""

    def __init__(self, writer: PromptWriter, tokenizer: Tokenizer, options: RenderOptions) -> None:
        self._writer = writer
        self._special_count = tokenizer.special_count
        self._leading_count = tokenizer.leading_special_count
        self._seed = options.seed
        self._ratio = options.shared_prefix_ratio
        self._groups = SharedTexts(writer, seed=options.seed, group_count=options.prefix_group_count)
        self._blocks = BlockTexts(writer, seed=options.seed)

    def prompts(self, plan: _Plan) -> tuple[list[str], list[int]]:
        """Return all prompts, those of a request together, and how many tokens each request's beginning shares."""
        owners = np.repeat(np.arange(plan.count), plan.batch_sizes)
        firsts = np.cumsum(plan.batch_sizes) - plan.batch_sizes
        sequences = np.arange(len(owners)) - firsts[owners]
        indexes = plan.indexes[owners]
        numbers = numbers_of(self._seed, PROMPT_STREAM, (indexes << SEQUENCE_BITS | sequences).astype(np.uint64))
        wanted = (plan.input_tokens - self._special_count)[owners]
        if plan.blocks and self._ratio:
            problem = f"must be 0 where the trace says what prompts share, is {self._ratio:g}"
            raise InvalidInputError([Violation("shared_prefix_ratio", problem)])
        if plan.blocks:
            beginnings, tokens = self._trace_beginnings(plan.blocks, owners, sequences, wanted)
        elif self._ratio:
            beginnings, tokens = self._group_beginnings(indexes, plan.input_tokens[owners], wanted)
        else:
            return [self._writer.begin(text) for text in self._writer.texts(numbers, wanted)], [0] * plan.count
        shared = tokens[firsts]
        shared = np.where(shared > 0, shared + self._leading_count, 0)
        return self._followed(beginnings, tokens, numbers, wanted), shared.tolist()

    def _followed(self, beginnings: list[str], tokens: Integers, numbers: Keys, wanted: Integers) -> list[str]:
        """Put a prompt's own text behind what it shares, with the joiner between them where there is both."""
        missing = wanted - tokens
        is_joined = (tokens > 0) & (missing > 0)
        texts = self._writer.texts(numbers, missing - is_joined)
        joiners = ["", self._writer.joiner]
        rows = zip(beginnings, is_joined.tolist(), texts, strict=True)
        return [self._writer.begin(f"{beginning}{joiners[joined]}{text}") for beginning, joined, text in rows]

    def _group_beginnings(self, indexes: Integers, inputs: Integers, wanted: Integers) -> tuple[list[str], Integers]:
        asked = np.floor(self._ratio * inputs + _ROUNDING).astype(np.int64) - self._leading_count
        asked = np.clip(asked, 0, wanted)
        rows = zip(indexes.tolist(), asked.tolist(), strict=True)
        found = [self._groups.beginning(index, token_count) for index, token_count in rows]
        return [text for text, _ in found], np.array([tokens for _, tokens in found], np.int64)

    def _trace_beginnings(
        self, blocks: tuple[Integers, Integers, int], owners: Integers, sequences: Integers, wanted: Integers
    ) -> tuple[list[str], Integers]:
        """Return the text of each prompt's blocks; the prompts of a batch but the first have their own last block."""
        ids, starts, size = blocks
        if size < (least := self._leading_count + self._blocks.least_tokens):
            raise InvalidInputError(
                [Violation("prefix_block_tokens", f"must be >= {least} for a block's text to be its own, is {size}")]
            )
        ends = wanted + self._leading_count
        counts = np.minimum(np.diff(starts)[owners], -(-ends // size)) - (sequences > 0)
        counts = np.maximum(counts, 0)
        prompts = np.repeat(np.arange(len(owners)), counts)
        first_blocks = np.cumsum(counts) - counts
        places = np.arange(len(prompts)) - first_blocks[prompts]
        tokens = np.minimum(size, ends[prompts] - places * size) - np.where(places == 0, self._leading_count, 0)
        texts = self._blocks.texts(ids[starts[owners[prompts]] + places], tokens)
        rows = zip(first_blocks.tolist(), (first_blocks + counts).tolist(), strict=True)
        beginnings = ["".join(texts[begin:end]) for begin, end in rows]
        return beginnings, np.bincount(prompts, weights=tokens, minlength=len(owners)).astype(np.int64)


def _violations(options: RenderOptions) -> Iterator[Violation]:
    if not 0 <= options.shared_prefix_ratio <= 1:
        yield Violation("shared_prefix_ratio", f"must be from 0 to 1, is {options.shared_prefix_ratio}")
    if not 1 <= options.prefix_group_count <= LARGEST_GROUP_COUNT:
        yield Violation(
            "prefix_group_count", f"must be from 1 to {LARGEST_GROUP_COUNT}, is {options.prefix_group_count}"
        )
    if not 0 <= options.seed <= LARGEST_SEED:
        yield Violation("seed", f"must be from 0 to 2^64 - 1, is {options.seed}")
    if options.server in _NEEDS_MODEL_NAME and not options.served_model:
        yield Violation("served_model", f"must be the model's name at the server for {options.server}, is empty")
