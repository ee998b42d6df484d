"""Reads typed values out of the text of a config.json and collects everything that is wrong with them.

Invariant: no text makes the reader raise anything but `InvalidInputError`. Hugging Face writes null for "the default",
so null is read as absent.
"""

import json
from collections import Counter
from typing import cast

from llmpilot_contracts.errors import InvalidInputError, Violation

FIELD = "config_json"
MAX_CHARACTER_COUNT = 1_000_000

TYPE_NAMES = {str: "a string", bool: "true or false", float: "a fraction", list: "a list", dict: "an object"}


def parse_object(text: str) -> dict[str, object]:
    """Return the JSON object in `text`; raise `InvalidInputError` if there is none or a key appears twice."""
    if len(text) > MAX_CHARACTER_COUNT:
        raise _invalid(f"must be at most {MAX_CHARACTER_COUNT:,} characters, has {len(text):,}")
    repeated: set[str] = set()

    def unique(pairs: list[tuple[str, object]]) -> dict[str, object]:
        repeated.update(key for key, count in Counter(key for key, _ in pairs).items() if count > 1)
        return dict(pairs)

    try:
        document: object = json.loads(text, object_pairs_hook=unique)
    except json.JSONDecodeError as error:
        raise _invalid(f"is not JSON: {error.msg} at line {error.lineno}, column {error.colno}") from error
    except RecursionError as error:
        raise _invalid("is nested too deeply to be a config.json") from error
    except ValueError as error:  # an integer of thousands of digits
        raise _invalid("holds a number with too many digits") from error
    if not isinstance(document, dict):
        raise _invalid("must be a JSON object, the content of a Hugging Face config.json")
    if repeated:
        keys = sorted(key[:80].encode("ascii", "backslashreplace").decode() for key in repeated)
        raise InvalidInputError(Violation(f"{FIELD}.{key}", "appears more than once") for key in keys)
    return cast("dict[str, object]", document)


def _invalid(description: str) -> InvalidInputError:
    return InvalidInputError([Violation(FIELD, description)])


class ConfigReader:
    """Reads values by any of their accepted names; a wrong value becomes a violation and reads as absent."""

    def __init__(self, document: dict[str, object]) -> None:
        self._document = document
        self.violations: list[Violation] = []

    def refuse(self, name: str, description: str) -> None:
        """Record, once, that the value called `name` is wrong."""
        violation = Violation(f"{FIELD}.{name}", description)
        if violation not in self.violations:
            self.violations.append(violation)

    def raise_violations(self) -> None:
        """Raise `InvalidInputError` with everything recorded so far, if anything was."""
        if self.violations:
            raise InvalidInputError(self.violations)

    def has(self, *names: str) -> bool:
        """Return whether any of the names is present and not null."""
        return any(self._document.get(name) is not None for name in names)

    def states(self, *names: str) -> bool:
        """Return whether any of the names is present and nothing has been found wrong with it so far."""
        name, value = self._find(names)
        return value is not None and all(violation.field != f"{FIELD}.{name}" for violation in self.violations)

    def count(self, *names: str, maximum: int, minimum: int = 1) -> int | None:
        """Return a whole number in minimum..maximum; None where absent or wrong."""
        name, value = self._find(names)
        if value is None:
            return None
        if type(value) is not int:
            self.refuse(name, f"must be a whole number, is {_describe(value)}")
        elif not minimum <= value <= maximum:
            self.refuse(name, f"must be between {minimum} and {maximum:,}, is {_shorten(value)}")
        else:
            return value
        return None

    def required_count(self, *names: str, maximum: int) -> int:
        """Return a whole number in 1..maximum; where absent (a violation too) or wrong, 1 stands in for it."""
        if not self.has(*names):
            also = f"; also accepted as {', '.join(names[1:])}" if names[1:] else ""
            self.refuse(names[0], f"is missing{also}")
        return self.count(*names, maximum=maximum) or 1

    def flag(self, *names: str, default: bool) -> bool:
        """Return a boolean."""
        name, value = self._find(names)
        if value is None:
            return default
        if not isinstance(value, bool):
            self.refuse(name, f"must be true or false, is {_describe(value)}")
            return default
        return value

    def word(self, *names: str) -> str | None:
        """Return a string; None where absent or wrong."""
        name, value = self._find(names)
        if value is None or isinstance(value, str):
            return value
        self.refuse(name, f"must be a string, is {_describe(value)}")
        return None

    def words(self, name: str) -> list[str] | None:
        """Return a list of strings; None where absent or wrong."""
        _, value = self._find((name,))
        if value is None:
            return None
        if isinstance(value, list) and all(isinstance(word, str) for word in value):
            return cast("list[str]", value)
        self.refuse(name, f"must be a list of strings, is {_describe(value)}")
        return None

    def section(self, name: str) -> dict[str, object] | None:
        """Return a nested object; None where absent or wrong."""
        _, value = self._find((name,))
        if value is None or isinstance(value, dict):
            return value
        self.refuse(name, f"must be an object, is {_describe(value)}")
        return None

    def _find(self, names: tuple[str, ...]) -> tuple[str, object]:
        found = next((name for name in names if self.has(name)), names[0])
        return found, self._document.get(found)


def _describe(value: object) -> str:
    if isinstance(value, list | dict):
        return TYPE_NAMES[type(value)]
    return f"{TYPE_NAMES.get(type(value), 'a number')} ({json.dumps(value)[:40]})"


def _shorten(value: int) -> str:
    return f"{value:,}" if abs(value) < 10**15 else f"a number of {len(str(abs(value)))} digits"
