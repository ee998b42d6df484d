"""Numbers as people read them. Invariant: what nobody reported is a dash, never 0."""

from datetime import UTC, datetime

NOTHING = "–"


def shown(value: float | None, unit: str = "") -> str:
    """Return three significant digits, whole numbers from 100 on with thousands apart."""
    if value is None:
        return NOTHING
    size = abs(value)
    if value == round(value) and size < 100:  # noqa: PLR2004 the digits of the docstring
        text = f"{value:.0f}"
    elif size >= 100:  # noqa: PLR2004
        text = f"{value:,.0f}"
    elif size >= 10:  # noqa: PLR2004
        text = f"{value:.1f}"
    else:
        text = f"{value:.2f}" if size >= 1 else f"{value:.3g}"
    return f"{text} {unit}" if unit else text


def percent(share: float | None) -> str:
    """Return a share of 1 in percent."""
    if share is None:
        return NOTHING
    return "0 %" if share == 0 else "100 %" if share == 1 else f"{100 * share:.3g} %"


def moment(unix_nanos: int) -> str:
    """Return a time in UTC, to the second; a dash if there is none."""
    return utc(unix_nanos).strftime("%Y-%m-%d %H:%M:%S UTC") if unix_nanos else NOTHING


def utc(unix_nanos: int) -> datetime:
    """Return a time as a datetime."""
    return datetime.fromtimestamp(unix_nanos / 1e9, UTC)
