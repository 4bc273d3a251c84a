"""What the scripts of `benchmarks/` share: ratios, and for `methods.py` grids, worker processes, tables and claims."""
