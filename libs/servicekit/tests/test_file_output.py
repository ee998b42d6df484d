from pathlib import Path

import pytest

from llmpilot_contracts.errors import PreconditionError
from llmpilot_servicekit.file_output import write_whole, written_whole


@pytest.mark.parametrize("name", ["new", "there", "x" * 255, "\N{SNOWMAN}" * 85])
def test_a_file_is_written_and_nothing_else(tmp_path: Path, name: str) -> None:
    (tmp_path / "there").write_bytes(b"before")
    write_whole(tmp_path / name, b"content")
    assert (tmp_path / name).read_bytes() == b"content"
    assert {path.name for path in tmp_path.iterdir()} == {"there", name}


@pytest.mark.parametrize("name", ["none/file", "there/file", "x" * 256])
def test_a_place_that_takes_no_file_is_named(tmp_path: Path, name: str) -> None:
    (tmp_path / "there").write_bytes(b"before")
    with pytest.raises(PreconditionError, match=f"{name} cannot be written: "):
        write_whole(tmp_path / name, b"content")
    assert [path.read_bytes() for path in tmp_path.iterdir()] == [b"before"]


def test_after_an_error_the_file_is_as_it_was(tmp_path: Path) -> None:
    def fail() -> None:
        with written_whole(tmp_path / "there") as file:
            file.write(b"half")
            raise KeyError

    (tmp_path / "there").write_bytes(b"before")
    with pytest.raises(KeyError):
        fail()
    assert [path.read_bytes() for path in tmp_path.iterdir()] == [b"before"]
