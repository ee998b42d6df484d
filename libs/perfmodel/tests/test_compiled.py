import os
from pathlib import Path
from typing import Any

from llmpilot_perfmodel.compiled import compiled, sources_stamp


def test_function_is_compiled_where_machine_code_cannot_be_kept() -> None:
    """One that comes from no file has no folder either."""
    namespace: dict[str, Any] = {}
    exec("def add(left, right):\n    return left + right", namespace)  # noqa: S102 this is how it comes from no file
    assert compiled(namespace["add"])(2, 3) == 5


def test_stamp_changes_with_any_source_below_the_folder(tmp_path: Path) -> None:
    (tmp_path / "steps").mkdir()
    source = tmp_path / "steps" / "time.py"
    source.write_text("")
    before = sources_stamp(tmp_path)
    assert sources_stamp(tmp_path) == before
    changed = source.stat().st_mtime_ns + 1_000
    os.utime(source, ns=(changed, changed))
    assert sources_stamp(tmp_path) != before
