"""Text: readers, corpora, positions, the format of a thought, embedded worlds."""
