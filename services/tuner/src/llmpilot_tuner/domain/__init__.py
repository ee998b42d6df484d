"""What a tuner knows without the outside: servers' rules, corner cases, the search, its verdict."""
