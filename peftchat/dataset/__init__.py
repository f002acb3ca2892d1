"""Encoded conversations: the cache on disk, truncation, packing and batches."""
