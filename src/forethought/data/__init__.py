"""Text data: readers, corpora, positions, the thought template, token bytes, embedded worlds."""
