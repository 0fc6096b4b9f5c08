"""Comparing compressors at several byte budgets on the same data: `plan` lists the runs, `results` collects them."""
