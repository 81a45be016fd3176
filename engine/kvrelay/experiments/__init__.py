"""Workloads, records and tables: what the command line and the benchmarks are made of."""
