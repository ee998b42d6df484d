import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from llmpilot_contracts.errors import InvalidInputError, PreconditionError
from llmpilot_simulator.write_log import WriteLog, read_write_log

NOW = 1_795_255_509_000_000_000
"""A wall time: its nanoseconds take 61 bits."""


def fill(log: WriteLog) -> None:
    first = log.register("a", 0, NOW - 5)
    second = log.register("b", 1, NOW - 4)
    log.extend((first, 0, NOW, NOW + 10, 1))
    log.extend((second, 0, NOW + 1, NOW + 11, 2))
    log.extend((second, 1, NOW + 2, NOW + 11, 2))


def test_a_file_gives_back_what_was_written_over_several_blocks(tmp_path: Path) -> None:
    log = WriteLog(tmp_path / "writes")
    fill(log)
    log.write_block(log.take_block())
    log.write_block(log.take_block())  # nothing new: no block
    log.extend((0, 1, NOW + 3, NOW + 13, 1))
    log.close()

    writes = read_write_log(tmp_path / "writes")

    assert writes.request_ids == ("a", "b")
    assert writes.choices.tolist() == [0, 1]
    assert writes.arrival_nanos.tolist() == [NOW - 5, NOW - 4]
    assert writes.reply.tolist() == [0, 1, 1, 0]
    assert writes.token_index.tolist() == [0, 0, 1, 1]
    assert writes.due_nanos.tolist() == [NOW, NOW + 1, NOW + 2, NOW + 3]
    assert writes.written_nanos.tolist() == [NOW + 10, NOW + 11, NOW + 11, NOW + 13]
    assert writes.chunk_tokens.tolist() == [1, 2, 2, 1]
    assert writes.lateness_nanos.tolist() == [10, 10, 9, 10]


def test_a_log_without_a_file_can_be_read_in_memory() -> None:
    log = WriteLog()
    fill(log)

    assert log.writes().due_nanos.tolist() == [NOW, NOW + 1, NOW + 2]


def test_the_rows_of_one_reply_are_found_by_its_request_id() -> None:
    log = WriteLog()
    fill(log)
    writes = log.writes()

    assert np.flatnonzero(writes.of("b", 1)).tolist() == [1, 2]
    assert not writes.of("b", 0).any()
    assert not writes.of("nobody").any()


def test_a_log_of_nothing_has_no_rows(tmp_path: Path) -> None:
    WriteLog(tmp_path / "writes").close()

    writes = read_write_log(tmp_path / "writes")

    assert writes.request_ids == ()
    assert len(writes.lateness_nanos) == 0


@pytest.mark.parametrize("lost_bytes", [1, 39, 60])
def test_the_unfinished_block_of_a_killed_process_is_left_out(tmp_path: Path, lost_bytes: int) -> None:
    path = tmp_path / "writes"
    log = WriteLog(path)
    fill(log)
    log.write_block(log.take_block())
    log.extend((0, 1, NOW + 3, NOW + 13, 1))
    log.register("c", 0, NOW)
    log.close()
    path.write_bytes(path.read_bytes()[:-lost_bytes])

    assert read_write_log(path).token_index.tolist() == [0, 0, 1]


def test_another_file_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "notes"
    path.write_text("not a log")

    with pytest.raises(InvalidInputError, match="is not a write log; make one with --write-log"):
        read_write_log(path)


def test_a_path_that_cannot_be_written_is_refused_at_once(tmp_path: Path) -> None:
    with pytest.raises(PreconditionError, match="give the write log another path"):
        WriteLog(tmp_path / "no such folder" / "writes")


FULL_DISK = """
import resource, sys
from pathlib import Path
from llmpilot_simulator.write_log import WriteLog

path = Path(sys.argv[1])
log = WriteLog(path)
log.extend((log.register("a", 0, 0), 0, 1, 1, 1))
log.write_block(log.take_block())
limit = path.stat().st_size + 60
resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit))
for index in range(1, 11):
    log.extend((0, index, 1, 1, 1))
try:
    log.write_block(log.take_block())
except OSError as error:
    problem = error.strerror
log.extend((0, 11, 1, 1, 1))
log.close()
sys.exit(problem)
"""
"""A process that may write files of so many bytes only, as on a disk that is nearly full."""


def test_a_full_disk_ends_the_file_and_leaves_it_readable(tmp_path: Path) -> None:
    path = tmp_path / "writes"
    done = subprocess.run([sys.executable, "-c", FULL_DISK, path], stderr=subprocess.PIPE, text=True, check=False)
    assert done.stderr == "File too large\n"
    assert read_write_log(path).token_index.tolist() == [0]


def test_a_disk_that_is_full_from_the_start_is_an_error_at_once() -> None:
    with pytest.raises(PreconditionError, match="No space left"):
        WriteLog(Path("/dev/full"))
