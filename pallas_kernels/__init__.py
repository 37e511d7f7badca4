"""Pallas kernels over a paged KV pool, for TPU and GPU, each with a plain reference. Needs jax only.

`README.md` in this folder has a row a kernel: shapes, backends, tolerance and how it was derived.
"""
