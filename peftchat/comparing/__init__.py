"""Comparison of variants: train them on the same data, evaluate, recommend.

A comparison passes through these modules in order:

- `candidates` names the variants.
- `compare_plan` turns them into recipes.
- `hyperparameter_search` proposes the settings to try, and `short_runs` shortens the runs that select among them.
- `compare` trains and evaluates the runs in processes of their own: `run_processes`, forked by `run_server`.
- `evaluate` is the child process of an evaluation.
- `outcomes` holds the results of each candidate.
- `evidence` pairs their losses, and `paired_statistics` gives the intervals.
- `recommend` chooses one candidate.
- `results` holds the content of `comparison.json`.
- `compare_report` writes the files and prints the table.
"""
