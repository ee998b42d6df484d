"""A Hugging Face tokenizer as servers use it, and the default one that ships with the package.

Invariant: a count includes the tokens that the tokenizer adds itself, as servers count them; nothing is cut or padded,
whatever the file says.
"""

import hashlib
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from functools import cache
from importlib import resources
from pathlib import Path

from tokenizers import Tokenizer as LoadedTokenizer

from llmpilot_contracts.errors import InvalidInputError, NotFoundError, PreconditionError, Violation

LARGEST_TOKENIZER_BYTES = 256 << 20
FILE_NAME = "tokenizer.json"
_PROBE = "a"


class Tokenizer:
    """A tokenizer; two of the same content are equal."""

    def __init__(self, content: bytes, *, label: str = FILE_NAME) -> None:
        """Read a tokenizer.json; raises InvalidInputError where it is none. label: what errors call it."""
        if len(content) > LARGEST_TOKENIZER_BYTES:
            raise _refusal(label, f"must have at most {LARGEST_TOKENIZER_BYTES} bytes, has {len(content)}")
        try:
            self._tokenizer = LoadedTokenizer.from_str(content.decode())
        except UnicodeDecodeError as error:
            raise _refusal(label, "is not text in UTF-8") from error
        except Exception as error:  # the library raises nothing more specific
            raise _refusal(label, f"is no tokenizer.json of Hugging Face's tokenizers library: {error}") from error
        self._tokenizer.no_truncation()
        self._tokenizer.no_padding()
        self.label = label
        self.digest = hashlib.sha256(content).hexdigest()
        """Of the file."""
        self.special_count = self._tokenizer.num_special_tokens_to_add(is_pair=False)
        """Tokens that are added to every text, at its beginning or its end."""
        self.leading_special_count = self._count_leading_specials()
        """How many of them come before the text."""

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Tokenizer) and self.digest == other.digest

    def __hash__(self) -> int:
        return hash(self.digest)

    @contextmanager
    def _encoding(self) -> Iterator[None]:
        try:
            yield
        except Exception as error:  # the library raises nothing more specific
            raise PreconditionError(f"{self.label} cannot encode text: {error}") from error

    def count(self, text: str) -> int:
        """Return how many tokens a server sees."""
        return len(self.encode(text))

    def count_each(self, texts: Sequence[str]) -> list[int]:
        """Return how many tokens of each text a server sees."""
        with self._encoding():
            return [len(encoding.ids) for encoding in self._tokenizer.encode_batch_fast(list(texts))]

    def encode(self, text: str) -> list[int]:
        """Return the ids of a text's tokens, with those that are added."""
        with self._encoding():
            ids: list[int] = self._tokenizer.encode(text).ids
        return ids

    def encode_plain(self, texts: Sequence[str]) -> list[list[int]]:
        """Return the ids of each text's own tokens, without those that are added."""
        with self._encoding():
            encodings = self._tokenizer.encode_batch_fast(list(texts), add_special_tokens=False)
        return [encoding.ids for encoding in encodings]

    def encode_with_places(self, text: str) -> tuple[list[int], list[tuple[int, int]]]:
        """Return the ids of a text's own tokens, and where in the text each begins and ends, in characters."""
        with self._encoding():
            encoding = self._tokenizer.encode(text, add_special_tokens=False)
        return encoding.ids, encoding.offsets

    def _count_leading_specials(self) -> int:
        with self._encoding():
            mask = self._tokenizer.encode(_PROBE).special_tokens_mask
        return mask.index(0) if 0 in mask else len(mask)


def read_tokenizer(path: Path) -> Tokenizer:
    """Read a tokenizer.json or the one in a folder; raises NotFoundError, InvalidInputError."""
    file = path / FILE_NAME if path.is_dir() else path
    try:
        return Tokenizer(file.read_bytes(), label=str(file))
    except FileNotFoundError as error:
        raise NotFoundError("tokenizer", str(file), hint="give a tokenizer.json or the folder of one") from error
    except OSError as error:
        raise _refusal(str(file), f"cannot be read: {error.strerror}") from error


@cache
def default_tokenizer() -> Tokenizer:
    """Return the byte-level BPE that `tokenizer_training.py` made; it adds no tokens of its own."""
    content = (resources.files("llmpilot_workload_generator") / "data" / FILE_NAME).read_bytes()
    return Tokenizer(content, label="the default tokenizer")


def _refusal(label: str, description: str) -> InvalidInputError:
    return InvalidInputError([Violation("tokenizer", f"{label} {description}")])
