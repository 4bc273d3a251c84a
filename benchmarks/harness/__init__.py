"""What `benchmarks/methods.py` is made of: grids of recipes, worker processes, tables and claims."""
