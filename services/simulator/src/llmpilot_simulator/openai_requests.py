"""The bodies of OpenAI requests, with vLLM's extensions.

Invariant: a wrong body is refused with one message that names everything wrong with it; fields that nobody knows are
ignored, and known ones that the simulator cannot honour are refused rather than ignored.
Source: vllm/entrypoints/openai/{completion,chat_completion}/protocol.py.
"""

from collections.abc import Callable
from typing import Annotated, Any, Self, TypeVar

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, ValidationError, model_validator

from llmpilot_contracts.errors import InvalidInputError, Violation

MAX_CHOICES = 128
"""The limit of OpenAI's `n`."""
MAX_SEQUENCES = 4096
"""Choices of all prompts of a request together: more than a server holds in its batch."""
MAX_TOKEN_ID = 2**63 - 1
_MAX_SEED = 2**63 - 1


def _prompt(value: object) -> object:
    if isinstance(value, str) or _is_list_of(_is_text, value) or _is_ids(value) or _is_list_of(_is_ids, value):
        return value
    raise ValueError("must be a text, a list of texts, a list of token ids >= 0, or a list of such lists; not empty")


def _is_list_of(is_item: Callable[[object], bool], value: object) -> bool:
    return isinstance(value, list) and len(value) > 0 and all(map(is_item, value))


def _is_text(value: object) -> bool:
    return isinstance(value, str)


def _is_ids(value: object) -> bool:
    return _is_list_of(_is_id, value)


def _is_id(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and 0 <= value <= MAX_TOKEN_ID


def _refused(value: object) -> object:
    if value in (None, False, 0, [], {}):
        return None
    raise ValueError("is not simulated; leave it out")


NotSimulated = Annotated[object, BeforeValidator(_refused)]


class StreamOptions(BaseModel):
    """What a stream says beside its tokens."""

    include_usage: bool | None = True
    continuous_usage_stats: bool | None = False


class OpenAiRequest(BaseModel):
    """What both endpoints take."""

    model_config = ConfigDict(extra="ignore")

    model: str | None = None
    n: int = Field(default=1, ge=1, le=MAX_CHOICES)
    min_tokens: int = Field(default=0, ge=0)
    ignore_eos: bool = False
    stop: str | list[str] | None = None
    include_stop_str_in_output: bool = False
    seed: int | None = Field(default=None, ge=-_MAX_SEED - 1, le=_MAX_SEED)
    stream: bool | None = False
    stream_options: StreamOptions | None = None
    temperature: float | None = Field(default=None, ge=0)
    top_p: float | None = Field(default=None, gt=0, le=1)
    truncate_prompt_tokens: int | None = Field(default=None, ge=1)
    logprobs: NotSimulated = None
    use_beam_search: NotSimulated = None
    return_token_ids: NotSimulated = None

    @property
    def stop_texts(self) -> tuple[str, ...]:
        """The stop sequences, none of them empty."""
        texts = [self.stop] if isinstance(self.stop, str) else self.stop or []
        return tuple(filter(None, texts))

    @property
    def has_usage(self) -> bool:
        """Whether a stream ends with the token counts."""
        return self.stream_options is not None and bool(self.stream_options.include_usage)

    @property
    def has_continuous_usage(self) -> bool:
        """Whether every chunk has the token counts so far; needs `include_usage` as in vLLM."""
        return self.has_usage and self.stream_options is not None and bool(self.stream_options.continuous_usage_stats)

    def check(self, max_tokens: int | None) -> None:
        """Raise ValueError with what contradicts itself."""
        problems = []
        if self.stream_options is not None and not self.stream:
            problems.append("Stream options can only be defined when `stream=True`.")
        if max_tokens is not None and self.min_tokens > max_tokens:
            problems.append(f"min_tokens must be less than or equal to max_tokens={max_tokens}, got {self.min_tokens}.")
        if problems:
            raise ValueError(" ".join(problems))


class CompletionRequest(OpenAiRequest):
    """The body of /v1/completions."""

    prompt: Annotated[Any, BeforeValidator(_prompt)]
    max_tokens: int | None = Field(default=16, ge=1)
    echo: bool | None = False
    best_of: NotSimulated = None
    suffix: NotSimulated = None

    @model_validator(mode="after")
    def _consistent(self) -> Self:
        self.check(self.max_tokens)
        if len(self.prompts) * self.n > MAX_SEQUENCES:
            raise ValueError(f"prompt: at most {MAX_SEQUENCES} choices in all, here are {len(self.prompts) * self.n}")
        return self

    @property
    def prompts(self) -> list[str | list[int]]:
        """The prompts, each a text or token ids."""
        if isinstance(self.prompt, str) or isinstance(self.prompt[0], int):
            return [self.prompt]
        return list(self.prompt)


class ContentPart(BaseModel):
    """A part of a message; only texts are simulated."""

    type: str
    text: str | None = None

    @model_validator(mode="after")
    def _is_text(self) -> Self:
        if self.type != "text" or self.text is None:
            raise ValueError(f'only parts of type "text" are simulated, this is {self.type!r}')
        return self


def _parts(content: object) -> object:
    if content is None:
        return []
    return [{"type": "text", "text": content}] if isinstance(content, str) else content


class Message(BaseModel):
    """A turn of the conversation."""

    role: str
    content: Annotated[list[ContentPart], BeforeValidator(_parts)] = Field(default_factory=list)
    """A text counts as its only part."""

    @property
    def text(self) -> str:
        """The text of all parts."""
        return "\n".join(part.text or "" for part in self.content)


class ChatRequest(OpenAiRequest):
    """The body of /v1/chat/completions."""

    messages: list[Message] = Field(min_length=1)
    max_tokens: int | None = Field(default=None, ge=1)
    max_completion_tokens: int | None = Field(default=None, ge=1)

    @model_validator(mode="after")
    def _consistent(self) -> Self:
        self.check(self.limit)
        return self

    @property
    def limit(self) -> int | None:
        """The largest number of tokens to generate; the newer name wins."""
        return self.max_tokens if self.max_completion_tokens is None else self.max_completion_tokens

    @property
    def prompt(self) -> str:
        """The conversation as one text, with the marks of a chat template."""
        turns = (f"<|{message.role}|>\n{message.text}\n" for message in self.messages)
        return "".join(turns) + "<|assistant|>\n"


Body = TypeVar("Body", bound=BaseModel)


def parse(kind: type[Body], content: bytes) -> Body:
    """Read a body; raises InvalidInputError with everything that is wrong with it."""
    try:
        return kind.model_validate_json(content)
    except ValidationError as error:
        raise InvalidInputError(
            Violation(".".join(map(str, detail["loc"])) or "body", detail["msg"].removeprefix("Value error, "))
            for detail in error.errors(include_url=False, include_context=False, include_input=False)
        ) from error
