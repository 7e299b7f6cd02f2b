"""Rows: files and benchmarks in, `Example`s, encoded rows and batches out."""
