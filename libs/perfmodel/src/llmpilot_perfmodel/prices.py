"""What one pod costs on a GPU profile, in US dollars per hour.

Invariant: every price is > 0 and says where it comes from. The bundled prices of the 14 published profiles are those
of Lazuka et al., 2024; the others are of a later date and meant to be replaced by the user's own.
"""

import re
from dataclasses import dataclass
from pathlib import Path

from llmpilot_perfmodel.csv_table import CsvTable, bundled_table, read_table

PROFILE_NAME_PATTERN = re.compile(r"[1-9][0-9]{0,3}x[A-Za-z0-9][A-Za-z0-9_.\-]{0,63}")


@dataclass(frozen=True, slots=True, kw_only=True)
class Price:
    """The price of one pod."""

    gpu_profile: str
    price_per_hour: float
    source: str


def load_prices(path: Path | None = None) -> dict[str, Price]:
    """Return the bundled prices by GPU profile name; a user's CSV adds prices or replaces those of its profiles.

    Its columns are gpu_profile, price_per_hour and, if wanted, source.
    """
    prices = _parse(bundled_table("prices.csv"), label="prices.csv", default_source="")
    return prices | read_prices(path) if path else prices


def read_prices(path: Path) -> dict[str, Price]:
    """Return the prices of a user's CSV alone."""
    return _parse(read_table(path), label=path.name, default_source=path.name)


def _parse(text: str, *, label: str, default_source: str) -> dict[str, Price]:
    table = CsvTable(text, label=label, required=("gpu_profile", "price_per_hour"), optional=("source",))
    prices: dict[str, Price] = {}
    for row in table.rows():
        name = row.text("gpu_profile")
        if name and not PROFILE_NAME_PATTERN.fullmatch(name):
            table.refuse(row.line, "gpu_profile", f'must be a name such as "2xA100-40GB", is {name[:80]!r}')
        if name in prices:
            table.refuse(row.line, "gpu_profile", f"{name[:80]} appears more than once")
        price_per_hour = row.number("price_per_hour") or 0
        prices[name] = Price(
            gpu_profile=name, price_per_hour=price_per_hour, source=row.text("source") or default_source
        )
    table.raise_violations()
    return prices
