import io
import tarfile
from pathlib import Path

import pytest

from llmpilot_contracts.errors import InvalidInputError, NotFoundError
from llmpilot_recommender.raw_source import raw_csvs

FILES = {"b/two.csv": b"2" * 3000, "b/c/one.csv": b"1" * 700, "a.csv": b""}
IGNORED = {"b/notes.txt": b"text", "b/._two.csv": b"macOS"}


def archive_of(path: Path, mode: str) -> Path:
    with tarfile.open(path, mode) as archive:  # type: ignore[call-overload]
        for name, content in (FILES | IGNORED).items():
            member = tarfile.TarInfo(name)
            member.size = len(content)
            archive.addfile(member, io.BytesIO(content))
        link = tarfile.TarInfo("link.csv")
        link.type, link.linkname = tarfile.SYMTYPE, "/etc/hostname"
        archive.addfile(link)
    return path


@pytest.mark.parametrize("mode", ["w", "w:gz", "w:bz2", "w:xz"])
def test_archive_gives_its_csvs_in_any_compression(tmp_path: Path, mode: str) -> None:
    sources, file_count = raw_csvs(archive_of(tmp_path / "raw", mode))
    assert dict(sources) == FILES
    assert file_count is None


def test_folder_gives_its_csvs_at_any_depth_in_order(tmp_path: Path) -> None:
    for name, content in (FILES | IGNORED).items():
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_bytes(content)
    sources, file_count = raw_csvs(tmp_path)
    assert list(sources) == sorted(FILES.items())
    assert file_count == 3


@pytest.mark.parametrize("mode", ["w", "w:gz", "w:bz2", "w:xz"])
def test_archive_cut_off_anywhere_is_rejected(tmp_path: Path, mode: str) -> None:
    whole = archive_of(tmp_path / "raw", mode).read_bytes()
    # The zero blocks at the end of a plain archive (two that close it, then filling) may be lost without harm.
    end = len(whole.rstrip(b"\0")) if mode == "w" else len(whole) - 64
    for cut in {*range(0, end, 512 if mode == "w" else 37), end}:
        path = tmp_path / "cut"
        path.write_bytes(whole[:cut])
        with pytest.raises(InvalidInputError, match="must be a complete tar archive or a folder"):
            list(raw_csvs(path)[0])


def test_file_that_is_no_archive_is_rejected(tmp_path: Path) -> None:
    path = tmp_path / "raw.csv"
    path.write_text("a,b\n" * 1000, encoding="utf-8")
    with pytest.raises(InvalidInputError, match=r"raw\.csv: must be a complete tar archive or a folder"):
        list(raw_csvs(path)[0])


def test_missing_source_is_not_found(tmp_path: Path) -> None:
    with pytest.raises(NotFoundError, match="give a folder of CSV files or a tar archive"):
        raw_csvs(tmp_path / "none")
