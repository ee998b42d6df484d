from pathlib import Path

import pytest

from llmpilot_servicekit.neighbours import address_file_of, neighbour_address


def test_a_service_is_found_by_the_file_that_it_writes(tmp_path: Path) -> None:
    address_file_of(tmp_path, "recommender").write_text('{"grpc": "127.0.0.1:5", "metrics": "127.0.0.1:6"}')
    assert neighbour_address(tmp_path, "recommender") == "127.0.0.1:5"


def test_where_no_folder_is_set_there_are_no_neighbours() -> None:
    assert neighbour_address(None, "recommender") is None


@pytest.mark.parametrize("written", [None, "", '{"grpc', "[]", "{}", '{"grpc": 5}'])
def test_a_service_that_does_not_serve_is_not_found(tmp_path: Path, written: str | None) -> None:
    if written is not None:
        address_file_of(tmp_path, "recommender").write_text(written)
    assert neighbour_address(tmp_path, "recommender") is None
