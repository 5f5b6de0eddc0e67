"""Benchmarks on real servers: python -m bench throughput."""
