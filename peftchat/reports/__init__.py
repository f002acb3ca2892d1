"""What a run leaves for people to read: the page, the model card, the closing table."""
