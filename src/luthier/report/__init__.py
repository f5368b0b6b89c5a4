"""Reports: one offline page for each run."""
