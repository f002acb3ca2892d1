"""Fold a run's adapter into its base, tensor by tensor, and prove that the result is what was trained.

The way of a weight: `shards` reads it, `layout` knows which parameter it is, `fold` changes it, `writer` appends it to
a new shard, `check` reopens what was written, `verify` compares the logits of both sides.
"""

from peftchat.merging.merge import MergeResult, merge_run
from peftchat.merging.prepare import MergeOptions

__all__ = ["MergeOptions", "MergeResult", "merge_run"]
