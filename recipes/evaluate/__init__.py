"""Benchmarks of models, a file a way of asking; every number has its protocol and an interval."""
