"""The LLMs whose config.json travels with the package, so that their names alone are enough.

Invariant: a bundled config.json holds facts of the published one, under the same keys, and nothing else.
"""

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
        raise NotFoundError("bundled LLM", name, hint=f"bundled are {', '.join(bundled_llms())}")
    return llm.config_json
