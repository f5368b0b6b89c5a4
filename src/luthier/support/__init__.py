"""The lowest room: errors, files, the cache, signals, keyed randomness, intervals, the sandbox."""
