"""What a load test is and what its numbers mean: pure, without sockets, clocks or files."""
