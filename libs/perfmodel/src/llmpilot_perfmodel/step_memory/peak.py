"""The memory of one step of an LLM at its peak, from its config.json alone.

Invariant: a function of its arguments; the same batch run by the reference execution takes this much in PyTorch's
allocator. Source: shared research of the tuner, confirmed tensor by tensor against transformers 5.23 and PyTorch 2.13.
"""

from collections.abc import Sequence
from functools import lru_cache

from llmpilot_perfmodel.architecture import T5Architecture
from llmpilot_perfmodel.llm_config import LlmConfig
from llmpilot_perfmodel.step_memory.batch import Batch, Execution, StepMemory
from llmpilot_perfmodel.step_memory.decoder import DecoderMemory
from llmpilot_perfmodel.step_memory.encoder_decoder import EncoderDecoderMemory
from llmpilot_perfmodel.step_memory.moment import Amount, Floats


class StepMemoryModel:
    """The memory of any step of one LLM under one execution: what does not depend on the batch is computed once."""

    def __init__(self, config: LlmConfig, execution: Execution) -> None:
        """Raises InvalidInputError where the LLM cannot be split into so many parts, see `llm_work`."""
        architecture = config.architecture
        self._memory: DecoderMemory | EncoderDecoderMemory
        if isinstance(architecture, T5Architecture):
            self._memory = EncoderDecoderMemory(config, architecture, execution)
        else:
            self._memory = DecoderMemory(config, architecture, execution)

    def of(self, batch: Batch) -> StepMemory:
        """Return the memory of each GPU at the peak of a step."""
        return self._memory.of(batch)

    def prefill_bytes(
        self,
        requests: Amount,
        lengths: Amount,
        residents: Sequence[tuple[Amount, Amount]] = (),
        *,
        all_logits: bool = False,
    ) -> Floats:
        """Return what each of many padded prefills takes beside the weights, the same as `of`.

        requests, lengths: of each prefill; residents: groups of requests, how many and of how many tokens, whose cache
        lies in memory meanwhile. An encoder-decoder's have one token of output, and it has no logits of its input.
        """
        if isinstance(self._memory, EncoderDecoderMemory):
            return self._memory.prefill_bytes(requests, lengths, residents)
        return self._memory.prefill_bytes(requests, lengths, residents, all_logits=all_logits)

    def decode_bytes(self, requests: Amount, inputs: Amount, outputs: Amount) -> Floats:
        """Return what each of many padded decode steps takes beside the weights, the same as `of`."""
        return self._memory.decode_bytes(requests, inputs, outputs)


def step_memory(config: LlmConfig, batch: Batch, execution: Execution) -> StepMemory:
    """Return the memory of each GPU at the peak of a step; raises InvalidInputError as `StepMemoryModel` does."""
    return _model(config, execution).of(batch)


@lru_cache(maxsize=32)
def _model(config: LlmConfig, execution: Execution) -> StepMemoryModel:
    return StepMemoryModel(config, execution)
