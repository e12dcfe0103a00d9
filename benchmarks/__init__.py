"""Measurements: python -m benchmarks.bench, python -m benchmarks.kernels."""
