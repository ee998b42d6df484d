import csv
from pathlib import Path

import pytest

from llmpilot_contracts.errors import InvalidInputError
from llmpilot_perfmodel.gpu_catalogue import load_catalogue
from llmpilot_perfmodel.prices import Price, load_prices

PUBLISHED = {"V100": "V100-16GB", "T4": "T4-16GB", "A10": "A10-24GB", "A100": "A100-40GB", "H100": "H100-80GB"}


def write(folder: Path, *lines: str) -> Path:
    path = folder / "mine.csv"
    path.write_text("\n".join(lines))
    return path


def violations(path: Path) -> dict[str, str]:
    with pytest.raises(InvalidInputError) as caught:
        load_prices(path)
    return {violation.field: violation.description for violation in caught.value.violations}


def test_every_profile_of_the_catalogue_has_a_price_with_a_source() -> None:
    prices = load_prices()
    assert set(prices) == {profile.name for profile in load_catalogue().profiles()}
    assert all(price.source for price in prices.values())


def test_fourteen_prices_are_the_published_ones() -> None:
    published = [price for price in load_prices().values() if price.source.startswith("Lazuka et al., 2024")]
    assert len(published) == 14
    assert load_prices()["1xA100-40GB"].price_per_hour == 4.09625


def test_the_other_prices_say_that_they_are_to_be_replaced() -> None:
    others = [price for price in load_prices().values() if not price.source.startswith("Lazuka")]
    assert all(price.source.endswith("replace with your own") for price in others)


def test_the_published_prices_are_kept(public_data: Path) -> None:
    with (public_data / "llm-pilot" / "prices.csv").open() as file:
        published = {row["GPU"]: float(row["price"]) for row in csv.DictReader(file)}
    prices = load_prices()
    for name, price in published.items():
        count, _, gpu = name.partition(" x ")
        assert prices[f"{count}x{PUBLISHED[gpu]}"].price_per_hour == price


def test_a_users_price_replaces_and_adds(tmp_path: Path) -> None:
    prices = load_prices(write(tmp_path, "gpu_profile,price_per_hour", "1xT4-16GB,0.526", "1xX1-32GB,2"))
    assert prices["1xT4-16GB"] == Price(gpu_profile="1xT4-16GB", price_per_hour=0.526, source="mine.csv")
    assert prices["1xX1-32GB"].price_per_hour == 2
    assert prices["2xT4-16GB"].price_per_hour == 2.754666667


def test_a_users_source_is_kept(tmp_path: Path) -> None:
    path = write(tmp_path, "gpu_profile,price_per_hour,source", '1xT4-16GB,0.526,"contract, 2026"')
    assert load_prices(path)["1xT4-16GB"].source == "contract, 2026"


@pytest.mark.parametrize("price", ["0", "-1", "nan", "inf", "1e400", "", "3,06", "$3", "free"])
def test_a_price_that_is_no_positive_number_is_rejected(tmp_path: Path, price: str) -> None:
    found = violations(write(tmp_path, "gpu_profile,price_per_hour", f'1xT4-16GB,"{price}"'))
    assert list(found) == ["mine.csv line 2, price_per_hour"]


def test_every_wrong_row_is_listed(tmp_path: Path) -> None:
    found = violations(
        write(tmp_path, "gpu_profile,price_per_hour", "1xT4-16GB,1", "1xT4-16GB,2", "T4-16GB,1", ",1", "2xT4-16GB,-1")
    )
    assert list(found) == [
        "mine.csv line 3, gpu_profile",
        "mine.csv line 4, gpu_profile",
        "mine.csv line 5, gpu_profile",
        "mine.csv line 6, price_per_hour",
    ]


def test_a_missing_column_is_rejected(tmp_path: Path) -> None:
    assert list(violations(write(tmp_path, "gpu_profile,price", "1xT4-16GB,1"))) == [
        "mine.csv 'price_per_hour'",
        "mine.csv 'price'",
    ]
