"""How long a server's step takes: constants, roofline, per-layer profiles, and how they are fitted."""
