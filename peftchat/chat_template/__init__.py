"""The chat format: special tokens, templates, ids with their mask, rows, batches."""
