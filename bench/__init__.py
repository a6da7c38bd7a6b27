"""Benchmarks: run from a checkout with `python -m bench`; both sides in one process, in turn, medians."""
