"""The memory of one step of an LLM at its peak, from its config.json alone.

Invariant: a function of its arguments; the same batch run by the reference execution takes this much in PyTorch's
allocator. Source: shared research of the tuner, confirmed tensor by tensor against transformers 5.23 and PyTorch 2.13.
"""

from functools import lru_cache

from llmpilot_perfmodel.architecture import T5Architecture
from llmpilot_perfmodel.llm_config import LlmConfig
from llmpilot_perfmodel.step_memory.batch import Batch, Execution, StepMemory
from llmpilot_perfmodel.step_memory.decoder import DecoderMemory
from llmpilot_perfmodel.step_memory.encoder_decoder import EncoderDecoderMemory


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


def step_memory(config: LlmConfig, batch: Batch, execution: Execution) -> StepMemory:
    """Return the memory of each GPU at the peak of a step; raises InvalidInputError as `StepMemoryModel` does."""
    return _model(config, execution).of(batch)


@lru_cache(maxsize=32)
def _model(config: LlmConfig, execution: Execution) -> StepMemoryModel:
    return StepMemoryModel(config, execution)
