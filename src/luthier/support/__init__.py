"""Below everything else: errors, files, the cache, signals, keyed randomness, intervals, the sandbox."""
