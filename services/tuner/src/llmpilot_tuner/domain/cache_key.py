"""What a result depends on, as one short text: the key that it is kept under.

Invariant: two tunings of one key find the same weight. Every field of a specification counts but those named here, so
that one added later counts too.
"""

import hashlib
import json
from dataclasses import asdict

from llmpilot_tuner.domain.probing import ProbeFacts
from llmpilot_tuner.domain.spec import TuningSpec

KEY_VERSION = 1
"""To be raised where the search, the corner cases or the verdict find another weight than before."""
_DOES_NOT_COUNT = ("config_json", "llm_name", "gpu_name", "model_folder", "step_seconds", "target")
"""Names; what is told in another way below; and the patience with a step, which no weight depends on."""
_FACTS = ("device", "capacity_bytes", "weight_bytes")


def cache_key(spec: TuningSpec, facts: ProbeFacts) -> str:
    """Return the digest of everything that the weight depends on: 64 hexadecimal digits."""
    fields = asdict(spec)
    counting = {name: value for name, value in fields.items() if name not in _DOES_NOT_COUNT}
    known = {name: getattr(facts, name) for name in _FACTS}
    content = {
        "key_version": KEY_VERSION,
        "config": json.loads(spec.config_json),  # the order of its keys and its spaces do not count
        "real_weights": spec.model_folder is not None,
        "server": [spec.target.url, *spec.target.command] if spec.target else None,
        "spec": counting | {"server": spec.server.value},
        "facts": known | {"kind": facts.kind.value, "versions": sorted(facts.versions)},
    }
    canonical = json.dumps(content, sort_keys=True, separators=(",", ":"), allow_nan=False)
    return hashlib.sha256(canonical.encode()).hexdigest()
