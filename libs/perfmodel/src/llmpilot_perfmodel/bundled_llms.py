"""The LLMs whose config.json travels with the package, so that their names alone are enough.

Invariant: a bundled config.json holds facts of the published one, under the same keys, and nothing else.
"""

import difflib
from dataclasses import dataclass
from functools import cache
from importlib.resources import files

from llmpilot_contracts.errors import NotFoundError


@dataclass(frozen=True, slots=True, kw_only=True)
class BundledLlm:
    """An LLM known by name."""

    name: str
    """As its publisher writes it, e.g. "meta-llama/Llama-3.1-8B"."""
    config_json: str


@cache
def _bundled() -> tuple[BundledLlm, ...]:
    folder = files("llmpilot_perfmodel") / "data" / "llms"
    return tuple(
        BundledLlm(
            name=name.removesuffix(".json").replace("--", "/", 1), config_json=(folder / name).read_text("utf-8")
        )
        for name in sorted((entry.name for entry in folder.iterdir() if entry.name.endswith(".json")), key=str.lower)
    )


def bundled_llms() -> tuple[str, ...]:
    """Return the names of the bundled LLMs, in alphabetical order."""
    return tuple(llm.name for llm in _bundled())


def find_bundled(name: str) -> BundledLlm | None:
    """Return the bundled LLM of that name; upper and lower case and the part before "/" do not matter."""
    wanted = name.casefold()
    for llm in _bundled():
        full = llm.name.casefold()
        if wanted in (full, full.partition("/")[2]):
            return llm
    return None


def bundled_config(name: str) -> str:
    """Return the text of a bundled LLM's config.json; raise `NotFoundError` if there is none."""
    llm = find_bundled(name)
    if llm is None:
        raise NotFoundError("bundled LLM", name[:80], hint=_hint(name))
    return llm.config_json


def _hint(name: str) -> str:
    by_short_name = {full.partition("/")[2].casefold(): full for full in bundled_llms()}
    wanted = name[:80].casefold().rpartition("/")[2]
    close = [by_short_name[short] for short in difflib.get_close_matches(wanted, by_short_name, n=3)]
    known = f"{len(by_short_name)} are bundled, e.g. {by_short_name['llama-3.1-8b']}"
    return f"did you mean {' or '.join(close)}?" if close else f"{known}; or give the path of a config.json"
