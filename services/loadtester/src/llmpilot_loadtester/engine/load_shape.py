"""How many users there are at a moment of a stage.

Invariant: before the first step there is nobody; after the last one its number stays.
"""

from llmpilot_loadtester.domain.spec import Load


def users_at(load: Load, seconds: float) -> int:
    """Return how many users a closed load has so long after its start."""
    begun = [step for step in load.user_steps if step.at_seconds <= seconds]
    if not begun:
        return 0
    last = begun[-1]
    later = load.user_steps[len(begun) : len(begun) + 1]
    if not load.ramp or not later:
        return last.users_count
    share = (seconds - last.at_seconds) / (later[0].at_seconds - last.at_seconds)
    return round(last.users_count + share * (later[0].users_count - last.users_count))
