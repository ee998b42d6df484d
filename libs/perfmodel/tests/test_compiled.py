import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from llmpilot_perfmodel import compiled as compiled_module
from llmpilot_perfmodel.compiled import compiled, sources_stamp


def test_function_is_compiled_where_machine_code_cannot_be_kept() -> None:
    """One that comes from no file has no folder either."""
    namespace: dict[str, Any] = {}
    exec("def add(left, right):\n    return left + right", namespace)  # noqa: S102 this is how it comes from no file
    assert compiled(namespace["add"])(2, 3) == 5


def doubled(number: int) -> int:
    return 2 * number


def test_machine_code_is_kept_with_the_stamp_of_all_sources() -> None:
    function: Any = compiled(doubled)
    assert function._cache._cache_file._source_stamp == sources_stamp(Path(compiled_module.__file__).parent)


def test_machine_code_of_other_sources_is_removed_before_anything_is_compiled(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr("numba.config.CACHE_DIR", str(tmp_path))
    for stamp in ("one", "other"):
        monkeypatch.setattr(compiled_module, "_STAMP", stamp)
        function = compiled(doubled)
        assert not [*tmp_path.rglob("*.nbc")]
        assert (function(21), function(4)) == (42, 8)
        assert len([*tmp_path.rglob("*.nbc")]) == 1
    again: Any = compiled(doubled)
    assert again(21) == 42
    assert sum(again.stats.cache_hits.values()) == 1


def test_numba_that_cannot_leave_out_reference_counts_is_good_enough(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delattr("numba.core.options.DefaultOptions._nrt")
    function: Any = compiled(doubled)
    assert "_nrt" not in function.targetoptions
    assert function(21) == 42


def test_machine_code_that_could_be_stale_is_not_kept(monkeypatch: pytest.MonkeyPatch) -> None:
    """A numba whose cache has no stamp, or keeps it elsewhere."""
    monkeypatch.setattr("numba.core.caching.IndexDataCacheFile", lambda **_: object())
    function: Any = compiled(doubled)
    assert not function._cache.cache_path
    assert function(21) == 42


def test_numba_is_imported_without_what_scipy_multiplies_matrices_with() -> None:
    """Nor is its import made to fail afterwards, which a None in its place would do."""
    program = "import sys, llmpilot_perfmodel.compiled; print(*sys.modules)"
    modules = subprocess.run([sys.executable, "-c", program], check=True, capture_output=True, text=True).stdout.split()
    assert "numba.np.arraymath" in modules
    assert not {"scipy.linalg", "scipy.linalg.cython_blas"} & set(modules)


def test_stamp_changes_with_any_source_below_the_folder(tmp_path: Path) -> None:
    (tmp_path / "steps").mkdir()
    source = tmp_path / "steps" / "time.py"
    source.write_text("")
    before = sources_stamp(tmp_path)
    assert sources_stamp(tmp_path) == before
    changed = source.stat().st_mtime_ns + 1_000
    os.utime(source, ns=(changed, changed))
    assert sources_stamp(tmp_path) != before
