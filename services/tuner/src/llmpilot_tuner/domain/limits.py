"""The limits that a server admits requests by.

Invariant: `violations` lists everything that is wrong with limits before anything is computed from them.
"""

from dataclasses import dataclass

from llmpilot_contracts.errors import Violation
from llmpilot_perfmodel.step_memory.batch import Layout
from llmpilot_tuner.domain.servers import ServerRules

LARGEST_WEIGHT = 2**62
LARGEST_REQUEST_COUNT = 2**14
"""Corner cases are looked for among all counts of requests; no server runs so many at once."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Limits:
    """What requests and batches may be, but for the maximum batch weight that is looked for."""

    rules: ServerRules
    longest_sequence: int
    """Input and output tokens of a request together."""
    most_new_tokens: int
    """Output tokens of a request."""
    most_requests: int
    """In the batch at once."""
    prefill_limit: int | None = None
    """Most weight of one prefill; vLLM: most tokens of one step; None: a prefill may be as large as the batch."""
    is_encoder_decoder: bool = False
    prompt_logprobs: bool = False
    """Whether requests may ask for the log-probabilities of their input."""

    @property
    def longest_input(self) -> int:
        """Input tokens of a request; an encoder-decoder's input and output have the limit of a sequence together."""
        return self.longest_sequence - 1

    @property
    def lowest_weight(self) -> int:
        """The weight that one longest request has, in whole blocks: a server with less could not serve it."""
        return self.rules.weight_definition.weight(1, self._longest_in_blocks)

    @property
    def highest_weight(self) -> int:
        """The weight of a batch that is full of longest requests, in whole blocks: no batch has more."""
        return self.rules.weight_definition.weight(self.most_requests, self._longest_in_blocks)

    @property
    def _longest_in_blocks(self) -> int:
        size = self.rules.block_size
        return -(-self.longest_sequence // size) * size

    def violations(self, field: str = "limits") -> list[Violation]:
        """Return everything that is wrong."""
        found = []
        counts = {"most_new_tokens": self.most_new_tokens, "most_requests": self.most_requests}
        if self.longest_sequence < 2:  # noqa: PLR2004 one token in, one out
            found.append(
                Violation(
                    f"{field}.longest_sequence", f"must be >= 2, one token in and one out, is {self.longest_sequence}"
                )
            )
        found += [
            Violation(f"{field}.{name}", f"must be >= 1, is {count}") for name, count in counts.items() if count < 1
        ]
        if self.most_requests > LARGEST_REQUEST_COUNT:
            found.append(
                Violation(f"{field}.most_requests", f"must be <= {LARGEST_REQUEST_COUNT:,}, is {self.most_requests:,}")
            )
        if not found and self.most_new_tokens >= self.longest_sequence:
            found.append(
                Violation(
                    f"{field}.most_new_tokens",
                    f"must be < longest_sequence {self.longest_sequence}, which has the input too, "
                    f"is {self.most_new_tokens}",
                )
            )
        if self.prefill_limit is not None and self.prefill_limit < 1:
            found.append(Violation(f"{field}.prefill_limit", f"must be >= 1, is {self.prefill_limit}"))
        if not found:
            found += self._contradictions(field)
        return found

    def _contradictions(self, field: str) -> list[Violation]:
        found = []
        if self.highest_weight > LARGEST_WEIGHT:
            found.append(Violation(field, "most_requests longest sequences weigh more than 2^62: lower one of the two"))
        limit, longest = self.prefill_limit, self.longest_input
        if limit is not None and self.rules.chunks_prefills and limit < self.most_requests:
            found.append(
                Violation(
                    f"{field}.prefill_limit",
                    f"must be >= most_requests {self.most_requests}: each takes one token of a step, is {limit}",
                )
            )
        if limit is not None and not self.rules.chunks_prefills and self.prefill_weight(1, longest) > limit:
            found.append(
                Violation(
                    f"{field}.prefill_limit",
                    f"must be >= {self.prefill_weight(1, longest)}, the weight of one input of {longest} tokens, which "
                    f"would never be admitted, is {limit}",
                )
            )
        if self.is_encoder_decoder and self.rules.layout is not Layout.PADDED:
            found.append(Violation(f"{field}.server", f"{self.rules.server} does not serve encoder-decoders"))
        return found

    def prefill_weight(self, request_count: int, input_tokens: int) -> int:
        """Return the weight of a prefill of so many requests of so many input tokens each."""
        if self.rules.layout is Layout.PACKED or self.rules.prefill_weight == "tokens":
            return request_count * input_tokens
        return int(request_count * input_tokens**1.5)
