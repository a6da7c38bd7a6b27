"""Benchmarks: run from a checkout with `python -m bench`; all sides in one process, in turn, medians."""
