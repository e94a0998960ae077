"""Benchmark questions."""
