"""The report: one offline page a run."""
