"""Benchmarks of `secondorder` beside its peers; `python -m benchmarks` lists them.

They use the public names of the library only, run on any device that JAX offers, and compare within one run.
"""
