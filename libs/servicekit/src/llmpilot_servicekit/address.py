"""Addresses as this platform writes them: host:port."""

_MAX_PORT = 65_535


def split_address(address: str) -> tuple[str, int]:
    """Split "host:port" or "[v6]:port"; ValueError if it is neither."""
    host, colon, port = address.rpartition(":")
    host = host.removeprefix("[").removesuffix("]")
    if not (colon and host and "/" not in host and port.isascii() and port.isdigit() and int(port) <= _MAX_PORT):
        raise ValueError("must be host:port with a port from 0 (any free one) to 65535")
    return host, int(port)
