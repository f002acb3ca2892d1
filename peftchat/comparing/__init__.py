"""Trains variants of one recipe on the same rows, measures them, and says which to take and why.

The way of a comparison: `candidates` says what is compared, `plan` turns it into recipes, `search` picks the settings
to try, `job` trains one of them in a process of its own, `measure` looks at the finished run, `outcome` gathers,
`choose` recommends, `table` and `page` show.
"""
