"""The named workload models that ship with the service: model files, each with its source and an arrival default.

Invariant: every profile is what `profile_making.py` makes of the public data that its provenance names.
"""

from collections.abc import Mapping
from pathlib import Path
from types import MappingProxyType

from llmpilot_contracts.errors import NotFoundError
from llmpilot_workload_generator.files.model_file import SUFFIX, read_model
from llmpilot_workload_generator.model import WorkloadModel

DESCRIPTIONS: Mapping[str, str] = MappingProxyType(
    {
        "production": "an LLM platform of a company, 24 LLMs and thousands of users: lengths, batches, parameters",
        "code": "code completion: long prompts, short replies, in bursts",
        "conversation": "chat: prompts with their history, replies of two kinds of length",
        "summarization": "news articles: long prompts, short replies",
        "question-answering": "questions, some with a text to answer from: short prompts and replies",
        "text-generation": "instructions: very short prompts, short replies",
        "long-context": "chat with documents: prompts of up to 126,000 tokens",
    }
)
"""What requests are drawn from a profile; where they come from says the model's provenance."""
PROFILE_NAMES: tuple[str, ...] = tuple(DESCRIPTIONS)
FOLDER = Path(__file__).parent / "data" / "profiles"


def load_profile(name: str) -> WorkloadModel:
    """Return the named profile; raises NotFoundError that lists them."""
    if name not in DESCRIPTIONS:
        raise NotFoundError("profile", name, hint=f"there are {', '.join(PROFILE_NAMES)}")
    return read_model(profile_path(name))


def profile_path(name: str, folder: Path = FOLDER) -> Path:
    """Return where a profile is kept."""
    return folder / f"{name}{SUFFIX}"
