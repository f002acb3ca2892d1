"""From a recipe to a run folder: the trainer, the loss, launching, checkpoints."""
