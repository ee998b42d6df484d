"""Numbers as people read them. Invariant: what nobody reported is a dash, never 0."""

from datetime import UTC, datetime

NOTHING = "–"
_WHOLE_FROM = 100
_TEN = 10
_DECIMALS = 2


def shown(value: float | None, unit: str = "") -> str:
    """Return three significant digits, whole numbers from 100 on with thousands apart."""
    if value is None:
        return NOTHING
    rounded = value if abs(value) >= _WHOLE_FROM else float(f"{value:.3g}")
    size = abs(rounded)
    if size >= _WHOLE_FROM or value == round(value):
        text = f"{rounded:,.0f}"
    else:
        text = f"{rounded:.3g}" if size < 1 else f"{rounded:.{_DECIMALS - (size >= _TEN)}f}"
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
