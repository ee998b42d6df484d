"""Creations that are cut short; whole ones are in test_service.py."""

import asyncio
import tempfile
import threading
import time
from collections.abc import AsyncIterator, Callable
from pathlib import Path

import pytest

from llmpilot_contracts.errors import InvalidInputError, UnavailableError
from llmpilot_workload_generator import model_creation
from llmpilot_workload_generator.model import WorkloadModel
from llmpilot_workload_generator.model_creation import Advance, Creations, Recipe, find_mounted

TIMEOUT_SECONDS = 30


def recipe(**changes: object) -> Recipe:
    fields = {
        "model_id": "m",
        "mounted_path": "",
        "file_name": "trace.csv",
        "file_size_bytes": 3,
        "format_name": None,
        "parameters": (),
        "max_bins": 64,
        "source": "",
        "keep_replay": False,
        "arrivals": None,
    }
    return Recipe(**{**fields, **changes})  # type: ignore[arg-type]


async def chunks(*parts: bytes) -> AsyncIterator[bytes]:
    for part in parts:
        yield part


def creations(**changes: object) -> Creations:
    fields = {"traces": None, "max_count": 2, "max_upload_bytes": 1000, "idle_seconds": TIMEOUT_SECONDS}
    return Creations(**{**fields, **changes})  # type: ignore[arg-type]


@pytest.fixture
def uploads(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Where files are kept while they are read."""
    folder = tmp_path / "uploads"
    folder.mkdir()
    monkeypatch.setattr("tempfile.tempdir", str(folder))
    return folder


def test_a_fit_that_is_cancelled_stops_and_its_file_is_removed(uploads: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A fit of which only the tenth step notices that nobody waits any more."""
    started, ended, steps = threading.Event(), threading.Event(), 0

    def slow_fit(path: Path, _: Recipe, advance: Advance, *, root: Path) -> WorkloadModel:
        nonlocal steps
        assert path.read_bytes() == b"abc"
        assert root == path.parent
        started.set()
        try:
            while True:
                steps += 1
                if steps % 10 == 0:
                    advance(steps, None)
                time.sleep(0)
        finally:
            assert path.exists()
            ended.set()

    monkeypatch.setattr(model_creation, "make_model", slow_fit)

    async def check() -> None:
        made = creations()
        making = asyncio.create_task(made.make(recipe(), chunks(b"a", b"bc")))
        assert await asyncio.to_thread(started.wait, TIMEOUT_SECONDS)
        making.cancel()
        await asyncio.wait([making])
        assert making.cancelled()
        assert ended.is_set()

    asyncio.run(check())
    assert list(uploads.iterdir()) == []


def test_a_file_is_removed_in_a_thread(uploads: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of gigabytes that takes a fifth of a second, in which no other call would be answered."""
    removing: list[int] = []

    class Folder(tempfile.TemporaryDirectory[str]):
        def cleanup(self) -> None:
            removing.append(threading.get_ident())
            super().cleanup()

    monkeypatch.setattr(tempfile, "TemporaryDirectory", Folder)
    with pytest.raises(InvalidInputError, match="but only 0 bytes came"):
        asyncio.run(creations().make(recipe(), chunks()))
    assert len(removing) == 1
    assert removing[0] != threading.get_ident()
    assert list(uploads.iterdir()) == []


def test_without_a_place_for_the_file_the_client_is_told_to_come_again(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("tempfile.tempdir", "/no/such/folder")
    with pytest.raises(
        UnavailableError, match=r"trace\.csv cannot be kept while it is read: No such file or directory"
    ):
        asyncio.run(creations().make(recipe(), chunks(b"abc")))


@pytest.mark.parametrize("content", [b"", b"ab", b"abcd"])
def test_a_file_of_another_size_is_refused_and_removed(uploads: Path, content: bytes) -> None:
    with pytest.raises(InvalidInputError, match=r"spec\.file_size_bytes: is 3, but"):
        asyncio.run(creations().make(recipe(), chunks(content)))
    assert list(uploads.iterdir()) == []


def test_too_large_a_file_is_refused_before_it_is_sent() -> None:
    for name, size_bytes, most_bytes in (("a.csv", 1001, 1000), ("a.workload", 2**30, 512 * 2**20)):
        with pytest.raises(InvalidInputError, match=rf"must be at most {most_bytes}, is {size_bytes}"):
            asyncio.run(
                creations(max_upload_bytes=max(most_bytes, 1000)).make(
                    recipe(file_name=name, file_size_bytes=size_bytes), chunks(b"never read")
                )
            )


def test_one_creation_too_many_is_refused_and_the_slot_comes_back(uploads: Path) -> None:
    async def check() -> None:
        made, hold = creations(max_count=1), asyncio.Event()

        async def slow() -> AsyncIterator[bytes]:
            await hold.wait()
            yield b"ab"

        making = asyncio.create_task(made.make(recipe(), slow()))
        while not any(uploads.iterdir()):  # noqa: ASYNC110, ASYNC240 of a local folder, for an instant
            await asyncio.sleep(0)
        with pytest.raises(UnavailableError, match="1 models are being made"):
            await made.make(recipe(), chunks(b"abc"))
        hold.set()
        for creation in (making, made.make(recipe(), chunks(b"ab"))):
            with pytest.raises(InvalidInputError, match="but only 2 bytes came"):
                await creation

    asyncio.run(check())


def test_mounted_files_and_folders_are_found(tmp_path: Path) -> None:
    (tmp_path / "days").mkdir()
    (tmp_path / "days" / "1.csv").write_text("")
    (tmp_path / "today").symlink_to("days")
    assert find_mounted(tmp_path, "days/1.csv") == tmp_path / "days" / "1.csv"
    assert find_mounted(tmp_path, "days/../days") == tmp_path / "days"
    assert find_mounted(tmp_path, "today") == tmp_path / "days"


def test_without_a_folder_of_traces_no_path_is_taken() -> None:
    with pytest.raises(InvalidInputError, match=r"spec\.path: needs a service that was given a folder of traces"):
        find_mounted(None, "trace.csv")


def out_of_the_folder(root: Path) -> str:
    (root.parent / "secret.csv").write_text("")
    return "../secret.csv"


def by_a_link(root: Path) -> str:
    (root / "link").symlink_to(root.parent)
    return "link"


def by_a_link_in_a_folder(root: Path) -> str:
    (root / "folder").mkdir()
    (root / "folder" / "part.csv").symlink_to(root.parent / "secret.csv")
    return "folder"


@pytest.mark.parametrize(
    "make", [out_of_the_folder, by_a_link, by_a_link_in_a_folder, lambda _: "/etc", lambda _: "none"]
)
def test_no_path_leads_out(tmp_path: Path, make: Callable[[Path], str]) -> None:
    root = tmp_path / "traces"
    root.mkdir()
    with pytest.raises(InvalidInputError, match=r"spec\.path: must "):
        find_mounted(root, make(root))
