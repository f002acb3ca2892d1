"""Judge the runs of `laws.py`: `python scripts/make_laws_docs.py RESULTS.jsonl [OTHER.jsonl] [--write docs]`.

Each file of results is of one model. With `--write`, it becomes a section of docs/laws.md with a table and one plot a
law; without, the verdicts are printed.
"""

import argparse
from pathlib import Path

from laws_judged import TITLES, Law, judge
from laws_results import Measured, Results

from peftchat.comparing.paired_statistics import ONE_SEED_NOISE
from peftchat.files import write_text
from peftchat.formatting import format_count, format_rate
from peftchat.reports.svg import as_file, line_plot


def section(results: Results, laws: list[Law], number: int, docs: Path) -> list[str]:
    """Write the plots of a model, and return its section of the page."""
    about = results.about
    all_of_them = [one for name in results.names if (one := results.of(name, results.seeds(name))) is not None]
    conversations = len(all_of_them[0].tokens)
    lines = [
        f"\n## {about['model']}\n",
        f"Each run has {about['steps']} steps of two packs of {about['max_length']} tokens. The "
        f"{conversations} held-out conversations have {format_count(int(all_of_them[0].tokens.sum()))} "
        f"supervised tokens.\nThe loss before training is {_before(results):.3f}.",
        "\n| law | found | verdict |\n|---|---|---|",
        *(f"| {law.title} ({law.source}) | {law.found}{_edges(law)} | **{law.verdict}** |" for law in laws),
    ]
    tried = {law.title for law in laws}
    if missing := [title for title in TITLES if title not in tried]:
        lines += ["\nNot tried on this model:\n", *(f"- {title}" for title in missing)]
    lines += ["\n| setting | parameters | seeds | rates | best rate | held-out loss | general text |"]
    lines += ["|---|---:|---:|---:|---:|---:|---:|", *(_row(results, one) for one in all_of_them)]
    for place, law in enumerate(laws, 1):
        plot = line_plot(law.series(), label=f"{law.title}: {about['model']}", x_name="log10 of the learning rate")
        name = f"pictures/law-{number}-{place}.svg"
        write_text(docs / name, as_file(plot) + "\n")
        lines.append(f"\n### {law.title}: {about['model']}\n")
        lines.append(f"{law.y_name.capitalize()} over the rate: **{law.verdict}**.\n\n![{law.title}]({name})")
    return lines


def _row(results: Results, one: Measured) -> str:
    level, general = one.best().sum(-1).mean() / one.tokens.sum(), one.general[0, 0, :, 1].sum()
    rise = one.best_general().sum(-1).mean() / general - sum(loss for loss, _ in results.untrained) / general
    seeds, rates, best = len(results.seeds(one.name)), len(one.rates), format_rate(float(one.rates[one.best_place]))
    where = " (at the end)" if one.at_edge else ""
    return (
        f"| {one.name} | {format_count(one.trained)} | {seeds} | {rates} | {best}{where} | {level:.3f} | {rise:+.3f} |"
    )


def _before(results: Results) -> float:
    return float(next(row["before"] for row in results.rows.values() if "before" in row))


def _edges(law: Law) -> str:
    return f". The lowest loss of {', '.join(law.at_edge)} is at the end of its rates" if law.at_edge else ""


def page(sections: list[str], data: str, models: list[str]) -> str:
    """Return the page."""
    names = " and ".join(f"`{name}`" for name in models)
    return "\n".join([
        "# Published laws, run again\n",
        "Written by `scripts/laws.py` and `scripts/make_laws_docs.py`.",
        "Losses are held-out, in nats per supervised token.\n",
        f"- Models: {names}. No law was tried on another model for this page.",
        f"- Data: {data}.",
        "- Rates are a factor of 2.15 apart. Where a lowest loss is at the end of its rates, no verdict is given.",
        "- Differences are those at each side's best rate, paired by conversation and seed.",
        "- Intervals are two standard errors over conversations and seeds; with two seeds the part of seeds is rough.",
        f"- With one seed, {100 * ONE_SEED_NOISE:g} % of the loss is added on both sides: a guess at the noise of "
        "runs, as in `compare`.",
        "- A best rate has an interval over conversations and seeds drawn again, and half a step of the rates "
        "on each side.",
        "- What a model forgets is the rise of its loss on general text, the sample that `compare` uses.",
        "- Small models need not show the laws of large ones, and short runs say little about long ones.",
        *sections,
        HOW,
    ]) + "\n"  # fmt: skip


HOW = """
## Run it again

`tasks.jsonl` has the 175 seed tasks and the 252 user-oriented tasks of
[Self-Instruct](https://github.com/yizhongw/self-instruct): `data/seed_tasks.jsonl` and
`human_eval/user_oriented_instructions.jsonl`, each as one line with `instruction`, `input` and `output` of its first
instance. An interrupted script goes on from its file of results. Other models and data can be given.

The runs of the 135M model took 65 minutes of one niced thread on busy cores (2026-11-26). That was enough for one seed
and for two rates of QLoRA: its lowest loss is at the end of them, so nothing is said of NF4.

```text
peftchat data prepare tasks.jsonl --eval-fraction 0.2 -o instructions
S="instructions/train.jsonl instructions/eval.jsonl --steps 64 --rates 3"
python scripts/laws.py stories260K $S --results small.jsonl
D="--steps 16 --max-length 128 --max-eval-samples 44 --template chatml --center 2e-3"
M="smollm2-135m instructions/train.jsonl instructions/eval.jsonl --results large.jsonl"
python scripts/laws.py $M $D --seeds 1 --rates 4 --settings "LoRA r16" full "attention alone" "all layers"
python scripts/laws.py $M $D --seeds 1 --rates 3 --settings "LoRA r2" "LoRA r64" "QLoRA (NF4)"
python scripts/make_laws_docs.py small.jsonl large.jsonl --write docs
```
"""


def main() -> None:
    """Print the verdicts, and write the page if asked."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("results", type=Path, nargs="+")
    parser.add_argument("--write", type=Path, help="the docs folder")
    parser.add_argument("--data", default="", help="what the data is; otherwise what the results say")
    arguments = parser.parse_args()
    sections: list[str] = []
    found = [Results.read(path) for path in arguments.results]
    for number, results in enumerate(found, 1):
        laws = judge(results)
        for law in laws:
            print(f"{results.about['model']}: {law.verdict}: {law.title}: {law.found}")
        if arguments.write:
            sections += section(results, laws, number, arguments.write)
    if arguments.write:
        data = arguments.data or found[0].about["data"]
        write_text(arguments.write / "laws.md", page(sections, data, [one.about["model"] for one in found]))


if __name__ == "__main__":
    main()
