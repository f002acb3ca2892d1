"""Planning: predict the memory, time and cost of a run from the model's config alone."""
