"""Configurations of other tools, read as recipes: one module a tool, and one type of table that they share."""
