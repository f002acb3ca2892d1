"""Merge a run's adapter into its base, tensor by tensor, and verify that the result is what was trained.

The path of a weight: `safetensors_files` reads its rows, `base_weights` maps them to a parameter, `deltas` change them,
a `ShardWriter` appends them to the new shard, `output` reopens what was written, `verify` compares logits.
"""

from peftchat.merging.merge import MergeResult, merge_run
from peftchat.merging.merge_job import MergeOptions

__all__ = ["MergeOptions", "MergeResult", "merge_run"]
