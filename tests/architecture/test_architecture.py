"""The rules of the house that no linter knows."""

import ast
import re
import tomllib
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
MEMBERS = sorted([ROOT / "proto", *(ROOT / "libs").glob("[!.]*"), *(ROOT / "services").glob("[!.]*")])
GRPC_SERVICES = [ROOT / "services" / name for name in ("loadtester", "recommender", "tuner", "workload-generator")]
GENERATED = re.compile(r"/proto/src/(fmaas|llmpilot)/")
LARGEST_MODULE_LINES = 600
PROTOBUF_ROOMS = re.compile(r"servicer|wire(_\w+)?|cli(_\w+)?")
"""Where protobuf messages are seen; a command line is a client and speaks them too."""


def sources() -> Iterator[Path]:
    for member in MEMBERS:
        yield from (path for path in (member / "src").rglob("*.py") if not GENERATED.search(path.as_posix()))


@pytest.mark.parametrize("member", MEMBERS, ids=lambda path: path.name)
def test_every_member_has_a_project_file_sources_and_tests(member: Path) -> None:
    assert (member / "pyproject.toml").is_file()
    assert list((member / "src").glob("*/py.typed"))
    assert list((member / "tests").glob("test_*.py"))


@pytest.mark.parametrize("service", GRPC_SERVICES, ids=lambda path: path.name)
def test_every_service_has_the_same_rooms(service: Path) -> None:
    rooms = {path.stem for path in (service / "src").glob("*/*.py")}
    assert {"__main__", "app", "settings", "servicer", "wire"} <= rooms


def test_import_rules_cover_every_member() -> None:
    linted = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["importlinter"]["root_packages"]
    packages = [path.parent.name for member in MEMBERS for path in (member / "src").glob("*/py.typed")]
    assert sorted(linted) == sorted(packages)


def test_protobuf_is_seen_only_at_the_edges() -> None:
    offenders = [
        str(path.relative_to(ROOT))
        for path in sources()
        if not PROTOBUF_ROOMS.fullmatch(path.stem)
        and not path.is_relative_to(ROOT / "proto")
        and any(name.startswith(("fmaas", "llmpilot.")) for name in imported(path))
    ]
    assert offenders == []


def imported(path: Path) -> Iterator[str]:
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.ImportFrom) and node.module:
            yield node.module
        elif isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)


def test_no_module_is_longer_than_the_house_allows() -> None:
    long = [str(path) for path in sources() if len(path.read_text().splitlines()) > LARGEST_MODULE_LINES]
    assert long == []


@pytest.mark.parametrize("lock", ["requirements.lock", "requirements-dev.lock"])
def test_locks_hold_hashes_and_no_addresses(lock: str) -> None:
    text = (ROOT / lock).read_text()
    assert "--hash=sha256:" in text
    assert not re.search(r"https?://|file:|--(extra-)?index|--find-links", text)


def test_the_default_install_is_lean() -> None:
    names = re.findall(r"^([a-z0-9_.-]+)==", (ROOT / "requirements.lock").read_text(), flags=re.MULTILINE)
    heavy = [name for name in names if re.match(r"torch|nvidia|triton|xgboost$|pandas", name)]
    assert heavy == []
