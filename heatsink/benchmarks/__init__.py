"""Measures the kernels: against what a user would run otherwise, and whole suites on a GPU."""
