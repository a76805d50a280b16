"""Solvers for https://github.com/benchopt/benchmark_bilevel."""
