"""The protocols of inference servers as bytes in and bytes out: no socket, no clock."""
