"""Chat templates and encoding: conversations to token ids, with the tags from which the loss mask is made."""
