"""Benchmarks, run by `make bench`; results with machine and versions under results/."""
