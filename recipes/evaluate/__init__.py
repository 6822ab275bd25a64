"""Benchmarks of models, one a file; every number has its protocol, its sample count and an interval."""
