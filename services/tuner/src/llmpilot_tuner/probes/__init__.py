"""Ways to learn what a batch needs of memory: by arithmetic, or by running it in a process of its own."""
