"""Where the other services of this machine listen, by the files that they write while they serve.

Invariant: an address is read anew each time, as a service that starts again may listen elsewhere.
"""

import json
from pathlib import Path


def address_file_of(folder: Path, service: str) -> Path:
    """Return where a service writes its addresses."""
    return folder / f"{service}.addresses.json"


def neighbour_address(folder: Path | None, service: str) -> str | None:
    """Return the gRPC address of a service; None: there is no folder, or the service does not serve."""
    if folder is None:
        return None
    try:
        written = json.loads(address_file_of(folder, service).read_text(encoding="utf-8"))
    except (OSError, ValueError):  # not there, not whole
        return None
    address = written.get("grpc") if isinstance(written, dict) else None
    return address if isinstance(address, str) else None
