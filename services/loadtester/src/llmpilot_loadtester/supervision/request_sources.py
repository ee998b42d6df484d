"""Where the requests of a stage come from: a file of prompts, or random words. Others are in `wire_requests`.

Invariant: the requests of a stage are a function of the spec and the stage's index alone: an interrupted stage that is
run again sends the same ones.
"""

import json
from collections.abc import AsyncIterator, Iterator, Mapping
from dataclasses import dataclass
from typing import Protocol

import numpy as np

from llmpilot_contracts.errors import PreconditionError
from llmpilot_loadtester.domain.spec import PromptRequests, SyntheticRequests
from llmpilot_loadtester.domain.spec import Protocol as ServerProtocol
from llmpilot_loadtester.protocols.bodies import body_for
from llmpilot_loadtester.wire_tgis import write_single_request


@dataclass(frozen=True, slots=True, kw_only=True)
class SourceRequest:
    """A request as its source has it."""

    body: bytes
    input_tokens: int = -1
    """-1: unknown."""
    arrival_offset_nanos: int | None = None
    """After the start of the stage; None: the source does not say when."""


class RequestSource(Protocol):
    """Gives the requests of any stage of a load test, each time from the first."""

    def requests(self, stage_index: int, served_model: str) -> AsyncIterator[SourceRequest]:
        """Yield the requests of a stage, for ever or to the end of a trace. Raises PilotError."""


def stage_seed(seed: int, stage_index: int) -> int:
    """Return the seed of a stage's requests: no two stages send the same prompts, which a server may have cached."""
    return (seed + stage_index * _GOLDEN) % 2**64


_GOLDEN = 0x9E3779B97F4A7C15
"""2^64 divided by the golden ratio: multiples of it are far apart."""


@dataclass(frozen=True, slots=True, kw_only=True)
class PromptSource:
    """The prompts of the client, in order, again from the first when they run out."""

    requested: PromptRequests
    protocol: ServerProtocol

    async def requests(self, stage_index: int, served_model: str) -> AsyncIterator[SourceRequest]:  # noqa: ARG002
        """Yield the same requests in every stage."""
        lines = [line for line in self.requested.jsonl.split(b"\n") if line.strip()]
        while lines:
            for line in lines:
                yield self._request(json.loads(line), served_model)

    def _request(self, line: Mapping[str, object], served_model: str) -> SourceRequest:
        if "body" in line:
            if self.protocol is ServerProtocol.TGIS:
                raise PreconditionError(
                    'TGIS takes no "body", as its requests are no JSON: give a "prompt" in each line'
                )
            return SourceRequest(
                body=json.dumps(line["body"], ensure_ascii=False, separators=(",", ":")).encode(),
                input_tokens=_count(line, "input_tokens", -1),
            )
        body = _body(
            self.protocol,
            served_model=served_model,
            prompt=str(line["prompt"]),
            output_tokens=_count(line, "output_tokens", self.requested.output_tokens),
            fixed_output_length=self.requested.fixed_output_length,
        )
        return SourceRequest(body=body, input_tokens=_count(line, "input_tokens", -1))


def _body(
    protocol: ServerProtocol, *, prompt: str, served_model: str, output_tokens: int, fixed_output_length: bool
) -> bytes:
    if protocol is ServerProtocol.TGIS:
        return write_single_request(prompt, output_tokens=output_tokens, fixed_output_length=fixed_output_length)
    return body_for(
        protocol,
        prompt=prompt,
        served_model=served_model,
        output_tokens=output_tokens,
        fixed_output_length=fixed_output_length,
    )


def _count(line: Mapping[str, object], name: str, default: int) -> int:
    value = line.get(name)
    return value if isinstance(value, int) else default


@dataclass(frozen=True, slots=True, kw_only=True)
class SyntheticSource:
    """Prompts of random common words, about a token each."""

    requested: SyntheticRequests
    protocol: ServerProtocol

    async def requests(self, stage_index: int, served_model: str) -> AsyncIterator[SourceRequest]:
        """Yield requests whose prompts differ from those of every other request and stage within the first words."""
        for prompt in synthetic_prompts(self.requested, stage_index):
            body = _body(
                self.protocol,
                served_model=served_model,
                prompt=prompt,
                output_tokens=self.requested.output_tokens,
                fixed_output_length=self.requested.fixed_output_length,
            )
            yield SourceRequest(body=body)  # what the words are in tokens, the server says


def synthetic_prompts(requested: SyntheticRequests, stage_index: int) -> Iterator[str]:
    """Yield prompts of `input_tokens` words.

    The first words are the number of the prompt, its last digit first, in digits that the seed shuffles. So prompts of
    five words or more are all different, and ones that follow each other differ from the first word on.
    """
    words: list[str] = np.random.default_rng(requested.seed).permutation(WORDS).tolist()
    rng = np.random.default_rng([requested.seed, stage_index])
    number = stage_index << _STAGE_BITS
    while True:
        for drawn in rng.integers(0, len(words), (_BLOCK_PROMPTS, requested.input_tokens)).tolist():
            digits = [number >> shift & 255 for shift in range(0, _NUMBER_BITS, 8)]
            drawn[: len(digits)] = digits[: requested.input_tokens]
            yield " ".join([words[index] for index in drawn])
            number += 1


_BLOCK_PROMPTS = 16
_STAGE_BITS = 24
_NUMBER_BITS = 40
_WORDS = (
    "the of and to in is you that it he was for on are as with his they at be this have from or one had by word but "
    "not what all were we when your can said there use an each which she do how their if will up other about out many "
    "then them these so some her would make like him into time has look two more write go see number no way could "
    "people my than first water been call who oil its now find long down day did get come made may part over new sound "
    "take only little work know place year live me back give most very after thing our just name good sentence man "
    "think say great where help through much before line right too mean old any same tell boy follow came want show "
    "also around form three small set put end does another well large must big even such because turn here why ask "
    "went men read need land different home us move try kind hand picture again change off play spell air away animal "
    "house point page letter mother answer found study still learn should world high every near add food between own "
    "below country plant last school father keep tree never start city earth eye light thought head under story saw "
    "left don few while along might close something seem next hard open example begin life always those both paper "
    "together got group often run important until children side feet car mile night walk"
)
WORDS = tuple(_WORDS.split())
"""256 words that are one token each in common vocabularies."""
