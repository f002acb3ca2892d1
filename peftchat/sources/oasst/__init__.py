"""OpenAssistant's exports and their rules."""
