"""Publishing a run or a model on the hub."""
