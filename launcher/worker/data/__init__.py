"""rows (files -> conversations) -> tokens (conversations -> token ids, once, by prepare) -> batches (token ids -> micro batches)."""
