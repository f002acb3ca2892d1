"""Comparison of variants: train them on the same examples, evaluate them, and recommend one.

A comparison passes through these modules in order: `candidates` names the variants, `compare_plan` turns them into
recipes, `hyperparameter_search` picks the settings to try, `compare` trains and evaluates them in child processes,
`evaluate` is the evaluation's child process, `outcomes` holds the results of each candidate, `recommend` picks one,
`results` is what `comparison.json` holds, and `compare_report` writes the files and prints the table.
"""
