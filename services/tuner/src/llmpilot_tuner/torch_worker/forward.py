"""One step of an LLM, run for the memory it takes.

Invariant: a step starts with the weights alone in memory and ends so, also when it fails; no tokens are generated to
reach a state, caches are made.
"""

import gc
import traceback
from collections.abc import Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from llmpilot_perfmodel.step_memory.batch import Batch, Execution, Layout, Rows
from llmpilot_tuner.torch_worker.attention import PackedStep, packed_step
from llmpilot_tuner.torch_worker.cache import (
    Pool,
    empty_cache,
    filled_cache,
    filled_encoder_decoder_cache,
    padded_rows,
    stretches,
)
from llmpilot_tuner.torch_worker.fake_memory import FakeMemory
from llmpilot_tuner.torch_worker.few_layers import few_layers
from llmpilot_tuner.torch_worker.model import LoadedLlm, load_llm
from llmpilot_tuner.torch_worker.sharding import Collective


@dataclass(frozen=True, slots=True, kw_only=True)
class StepOutput:
    """What a step read and what it computed."""

    token_ids: tuple[Any, ...]
    """Of each forward: [1, tokens] of a packed one, [requests, tokens] of a padded one."""
    logits: tuple[Any, ...]
    """Of each forward: [rows, vocabulary]."""


class StepRunner:
    """Loads an LLM, or this rank's part of it, and runs batches as the reference execution says."""

    def __init__(
        self,
        *,
        config_json: str,
        model_folder: Path | None,
        execution: Execution,
        device: str,
        rank: int = 0,
        collective: Collective | None = None,
        seed: int = 0,
    ) -> None:
        self._config_json = config_json
        self._model_folder = model_folder
        self._execution = execution
        self._device = device
        self._rank = rank
        self._collective = collective
        self._seed = seed
        self._loaded: LoadedLlm | None = None

    def load(self) -> None:
        """Build the LLM on the device; raises InvalidInputError, PreconditionError, and what torch raises."""
        self._loaded = load_llm(
            config_json=self._config_json,
            model_folder=self._model_folder,
            execution=self._execution,
            device=self._device,
            rank=self._rank,
            collective=self._collective,
            seed=self._seed,
        )

    @property
    def loaded(self) -> LoadedLlm:
        """What `load` built."""
        if self._loaded is None:
            raise RuntimeError("load() was not called")
        return self._loaded

    @property
    def weight_bytes(self) -> int:
        """Of this rank, once loaded."""
        return self.loaded.weight_bytes

    def run(self, batch: Batch) -> None:
        """Allocate what the batch needs, run its step, and free everything; raises what torch raises."""
        self.step(batch)

    def step(self, batch: Batch) -> StepOutput:
        """Run a batch and return what it read and computed, for those who want to compare."""
        try:
            with torch.inference_mode():
                return self._step(batch)
        except BaseException as error:  # noqa: BLE001 raised again, without what it holds
            _forget_frames(error)
            raise error.with_traceback(None)  # noqa: B904 it is the same error

    def _step(self, batch: Batch) -> StepOutput:
        llm = self.loaded
        shape = llm.cache_shape
        copied = shape.layers(batch.copied_tokens) if batch.copied_tokens else []
        if llm.is_encoder_decoder:
            output = self._encoder_decoder(batch)
        elif self._execution.layout is Layout.PACKED:
            output = self._packed(batch)
        else:
            output = self._padded(batch)
        del copied
        return output

    def _packed(self, batch: Batch) -> StepOutput:
        llm = self.loaded
        parts = stretches(batch)
        pool = Pool(llm.cache_shape, max(batch.pool_tokens, batch.token_count), parts)
        if not parts:
            return StepOutput(token_ids=(), logits=())
        positions = torch.cat(
            [self._positions(rows.context_tokens, rows.input_tokens, rows) for rows in batch.prefill]
            + [self._positions(rows.sequence_tokens - 1, 1, rows) for rows in batch.decode]
        )[None]
        ids = self._token_ids(1, positions.shape[1])
        memory = FakeMemory.active()
        is_short = memory is not None and memory.shortcuts
        step = PackedStep(pool=pool, stretches=parts, one_of_each=is_short)
        with packed_step(step), few_layers(llm.model) if is_short else nullcontext():
            logits = llm.model(
                input_ids=ids,
                position_ids=positions,
                past_key_values=pool,
                use_cache=True,
                logits_to_keep=0 if batch.all_logits else self._last_tokens(batch),
            ).logits[0]
        return self._chosen(ids, logits, batch.all_logits)

    def _positions(self, first: int, count: int, rows: Rows) -> Any:
        return torch.arange(first, first + count, device=self._device).repeat(rows.request_count)

    def _last_tokens(self, batch: Batch) -> Any:
        """Return where the last token of each request lies."""
        found = []
        start = 0
        for rows, length in [(rows, rows.input_tokens) for rows in batch.prefill] + [
            (rows, 1) for rows in batch.decode
        ]:
            stop = start + rows.request_count * length
            found.append(torch.arange(start + length - 1, stop, length, device=self._device))
            start = stop
        return torch.cat(found)

    def _padded(self, batch: Batch) -> StepOutput:
        llm = self.loaded
        config, shape = llm.model.config, llm.cache_shape
        others = [filled_cache(config, shape, rows.request_count, rows.sequence_tokens) for rows in batch.residents]
        outputs = []
        prefill, decode = padded_rows(batch.prefill), padded_rows(batch.decode)
        caches = []
        if decode is not None:
            caches.append(filled_cache(config, shape, decode.request_count, decode.sequence_tokens - 1))
        if prefill is not None:
            empty = empty_cache(config)
            outputs.append(
                self._padded_forward(prefill.request_count, prefill.input_tokens, 0, empty, batch.all_logits)
            )
            others.append(empty)
        if decode is not None:
            outputs.append(self._padded_forward(decode.request_count, 1, decode.sequence_tokens - 1, caches[0], False))
        del others, caches
        return _joined(outputs)

    def _padded_forward(
        self, request_count: int, token_count: int, earlier_count: int, cache: Any, all_logits: bool
    ) -> StepOutput:
        ids = self._token_ids(request_count, token_count)
        mask = self._mask(request_count, earlier_count + token_count)
        last = torch.arange(earlier_count, earlier_count + token_count, device=self._device)
        positions = last.expand(request_count, -1) if mask is None else _positions_after_padding(mask, token_count)
        logits = self.loaded.model(
            input_ids=ids,
            attention_mask=mask,
            position_ids=positions,
            past_key_values=cache,
            use_cache=True,
            logits_to_keep=0 if all_logits or token_count == 1 else self._last(token_count),
        ).logits
        return self._chosen(ids, logits.flatten(0, 1), all_logits)

    def _last(self, token_count: int) -> Any:
        """Return where the last token lies: an index copies it, and of a slice oneDNN copies far more."""
        return torch.full((1,), token_count - 1, device=self._device)

    def _mask(self, request_count: int, token_count: int) -> Any:
        """Return the mask of a batch whose last request is one token shorter; a request alone is not padded."""
        if request_count == 1 or token_count == 1:
            return None
        mask = torch.ones((request_count, token_count), dtype=torch.int64, device=self._device)
        mask[-1, 0] = 0
        return mask

    def _encoder_decoder(self, batch: Batch) -> StepOutput:
        others = [self._encoder_decoder_state(rows) for rows in batch.residents]
        outputs = []
        prefill, decode = padded_rows(batch.prefill), padded_rows(batch.decode)
        decoding = None if decode is None else self._encoder_decoder_state(decode, new=1)
        if prefill is not None:
            outputs.append(self._encode(prefill, others))
        if decode is not None and decoding is not None:
            hidden, cache = decoding
            outputs.append(self._decoder_forward(decode, hidden, cache))
        del others, decoding
        return _joined(outputs)

    def _encoder_decoder_state(self, rows: Rows, new: int = 0) -> tuple[Any, Any]:
        """Return the encoder's hidden states and the cache of requests that have made all but `new` tokens."""
        llm = self.loaded
        shape, count = llm.cache_shape, rows.request_count
        size = (count, rows.input_tokens, llm.config.architecture.hidden_size)
        hidden = torch.zeros(size, dtype=shape.dtype, device=shape.device)
        cache = filled_encoder_decoder_cache(
            llm.model.config,
            shape,
            request_count=count,
            encoder_tokens=rows.input_tokens,
            decoder_tokens=max(rows.output_tokens - new, 0),
        )
        return hidden, cache

    def _encode(self, rows: Rows, keep: list[Any]) -> StepOutput:
        """Read the input and make the first token; its hidden states and cache are kept."""
        llm = self.loaded
        ids = self._token_ids(rows.request_count, rows.input_tokens)
        mask = self._mask(rows.request_count, rows.input_tokens)
        hidden = llm.model.get_encoder()(input_ids=ids, attention_mask=mask).last_hidden_state
        cache = empty_cache(llm.model.config, is_encoder_decoder=True)
        keep.append((hidden, cache))
        output = self._decoder_forward(rows, hidden, cache)
        return StepOutput(token_ids=(ids, *output.token_ids), logits=output.logits)

    def _decoder_forward(self, rows: Rows, hidden: Any, cache: Any) -> StepOutput:
        ids = self._token_ids(rows.request_count, 1)
        logits = self.loaded.model(
            encoder_outputs=(hidden,),
            attention_mask=self._mask(rows.request_count, rows.input_tokens),
            decoder_input_ids=ids,
            past_key_values=cache,
            use_cache=True,
        ).logits
        return self._chosen(ids, logits.flatten(0, 1), all_logits=False)

    def _token_ids(self, *size: int) -> Any:
        """Return random tokens, the same ones every time: experts are chosen by them."""
        vocabulary = self.loaded.config.spec.vocabulary_size
        generator = torch.Generator(device=self._device).manual_seed(self._seed)
        return torch.randint(vocabulary, size, generator=generator, device=self._device)

    def _chosen(self, ids: Any, logits: Any, all_logits: bool) -> StepOutput:
        """Take the likeliest tokens, and the log-probabilities of the input where they are asked."""
        if all_logits:
            probabilities = torch.empty(logits.shape, dtype=torch.float32, device=logits.device).copy_(logits)
            torch.log_softmax(probabilities, -1, out=probabilities)
        logits.argmax(-1)
        return StepOutput(token_ids=(ids,), logits=(logits,))


def _positions_after_padding(mask: Any, token_count: int) -> Any:
    return mask.cumsum(-1).sub_(1).clamp_(min=0)[:, -token_count:]


def _joined(outputs: Sequence[StepOutput]) -> StepOutput:
    return StepOutput(
        token_ids=tuple(ids for output in outputs for ids in output.token_ids),
        logits=tuple(logits for output in outputs for logits in output.logits),
    )


def _forget_frames(error: BaseException) -> None:
    """Let go of the tensors that an error holds by the frames that it passed; where it came from stays as a note."""
    error.add_note("".join(traceback.format_tb(error.__traceback__)))
    pending: list[BaseException | None] = [error]
    seen: set[int] = set()
    while pending:
        one = pending.pop()
        if one is not None and id(one) not in seen:
            seen.add(id(one))
            traceback.clear_frames(one.__traceback__)
            one.__traceback__ = None  # a cleared frame still has its function, whose closure may hold tensors
            pending += [one.__cause__, one.__context__]
    gc.collect()
