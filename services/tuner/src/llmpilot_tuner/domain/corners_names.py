"""Names of corner cases, the same for the same extreme at every weight, so that a fit can follow it."""

from collections.abc import Sequence

_ROLES = {
    "mixed": ("mixed_length", "mixed_tokens", "mixed_count", "mixed_edge"),
    "logits_all": ("logits_all_long", "logits_all", "logits_all_many", "logits_all_edge"),
}


def named(family: str, shapes: Sequence[tuple[int, int, int]], *, late: bool = False) -> list[str]:
    """Return a name for each shape: count of requests (ascending), length of the longest, tokens of all.

    "long" has the longest, "many" the most requests, "fit" the most tokens (of equals the first; late: the last),
    "long1" one request more than "long"; "edge" is whatever the hull needs between them.
    """
    if not shapes:
        return []
    long, fit, many, edge = _ROLES.get(family, (f"{family}_long", f"{family}_fit", f"{family}_many", f"{family}_edge"))
    names: list[str] = [""] * len(shapes)
    indexes = range(len(shapes))
    order = (1, -1)[late]
    most_tokens = max(indexes, key=lambda index: (shapes[index][2], -order * index))
    longest = max(indexes, key=lambda index: (shapes[index][1], shapes[index][2]))
    many_requests = max(indexes, key=lambda index: shapes[index][0])
    roles = [(longest, long), (many_requests, many), (most_tokens, fit)]
    if family in {"mixed", "logits_all"}:
        roles = [(most_tokens, fit), (longest, long), (many_requests, many)]
    elif late:
        roles = [(many_requests, many), (most_tokens, fit), (longest, long)]
    for index, name in roles:
        names[index] = names[index] or name
    if family not in _ROLES and longest + 1 < len(shapes) and shapes[longest + 1][0] == shapes[longest][0] + 1:
        names[longest + 1] = names[longest + 1] or f"{long}1"
    free = [index for index in indexes if not names[index]]
    for position, index in enumerate(free, 1):
        names[index] = edge if position == 1 else f"{edge}{position}"
    return names
