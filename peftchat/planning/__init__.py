"""Will it fit? Memory, time and cost of a run, from the model's config alone."""
