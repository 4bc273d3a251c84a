"""Measurements on an NVIDIA GPU, see README.md: `PYTHONPATH=.:benchmarks python -m gpu.engines --help`."""
