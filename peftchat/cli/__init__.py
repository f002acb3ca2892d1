"""One file a verb: it parses, prints, and calls one function."""
