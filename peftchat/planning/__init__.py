"""Planning: predict memory, time and cost of a run from the model's config."""
