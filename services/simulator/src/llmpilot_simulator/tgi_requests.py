"""The bodies of TGI requests.

Invariant: limits and messages are those of TGI's validation, so that a client meets them here as it would there.
Source: text-generation-inference, router/src/{lib,validation}.rs.
"""

from typing import Annotated

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, ValidationError

from llmpilot_contracts.errors import InvalidInputError, Violation

MAX_STOP_SEQUENCES = 4
"""TGI's default of --max-stop-sequences."""
_MAX_SEED = 2**64 - 1


def _refused(value: object) -> object:
    if value in (None, False, 0, 1, [], {}):
        return None
    raise ValueError("is not simulated; leave it out")


NotSimulated = Annotated[object, BeforeValidator(_refused)]


class Parameters(BaseModel):
    """How to generate. Its ranges are checked by `problems`, in TGI's words."""

    model_config = ConfigDict(extra="ignore")

    max_new_tokens: int | None = None
    stop: list[str] = Field(default_factory=list)
    seed: int | None = Field(default=None, ge=0, le=_MAX_SEED)
    truncate: int | None = None
    details: bool = False
    decoder_input_details: bool = False
    return_full_text: bool | None = None
    temperature: float | None = None
    repetition_penalty: float | None = None
    top_k: int | None = None
    top_p: float | None = None
    typical_p: float | None = None
    best_of: NotSimulated = None
    top_n_tokens: NotSimulated = None
    grammar: NotSimulated = None


class GenerateRequest(BaseModel):
    """The body of /generate, /generate_stream and, with `stream`, of /."""

    inputs: str
    parameters: Parameters = Field(default_factory=Parameters)
    stream: bool = False

    def problems(self, *, max_input_tokens: int, is_stream: bool) -> list[str]:
        """Return what TGI would refuse before it looks at the length, most of it one after the other there."""
        given = self.parameters
        checks = (
            (_is_at_most(given.temperature, 0), "`temperature` must be strictly positive"),
            (_is_at_most(given.repetition_penalty, 0), "`repetition_penalty` must be strictly positive"),
            (_is_at_most(given.top_k, 0), "`top_k` must be strictly positive"),
            (_is_outside(given.top_p), "`top_p` must be > 0.0 and < 1.0"),
            (_is_outside(given.typical_p), "`typical_p` must be > 0.0 and < 1.0"),
            (_is_at_most(given.max_new_tokens, 0), "`max_new_tokens` must be strictly positive"),
            (
                len(given.stop) > MAX_STOP_SEQUENCES,
                f"`stop` supports up to {MAX_STOP_SEQUENCES} stop sequences. Given: {len(given.stop)}",
            ),
            (not self.inputs, "`inputs` cannot be empty"),
            (
                given.truncate is not None and not 0 < given.truncate <= max_input_tokens,
                f"`truncate` must be strictly positive and less than {max_input_tokens}. Given: {given.truncate}",
            ),
            (
                is_stream and given.decoder_input_details,
                "`decoder_input_details` == true is not supported when streaming tokens",
            ),
        )
        return [message for is_wrong, message in checks if is_wrong]


def _is_at_most(value: float | None, limit: float) -> bool:
    return value is not None and value <= limit


def _is_outside(share: float | None) -> bool:
    return share is not None and not 0 < share < 1


def parse(content: bytes) -> GenerateRequest:
    """Read a body; raises InvalidInputError with everything that is not of the right type."""
    try:
        return GenerateRequest.model_validate_json(content)
    except ValidationError as error:
        raise InvalidInputError(
            Violation(".".join(map(str, detail["loc"])) or "body", detail["msg"].removeprefix("Value error, "))
            for detail in error.errors(include_url=False, include_context=False, include_input=False)
        ) from error
