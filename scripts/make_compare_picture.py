"""Draw the pictures of comparisons: `python scripts/make_compare_picture.py [COMPARISON]`.

With the folder of a comparison, the picture of docs/compare.md's example is drawn; without, the README's, from the
table of eight variants on the 135M model in docs/compare.md. That page has the commands that made both.
"""

import sys
from pathlib import Path
from textwrap import wrap

from markupsafe import Markup

from peftchat.comparing.comparison_folder import ComparisonFolder
from peftchat.comparing.results import CandidateSummary, ComparisonSummary
from peftchat.files import write_text
from peftchat.reports.svg import Mark, interval_plot

PICTURE = Path("docs/pictures/compare.svg")
TABLE_PICTURE = Path("docs/pictures/compare-135m.svg")
PAGE = Path("docs/compare.md")
FORGETFUL = 5.0
"""Rise of the loss on general text, in percent, beyond which `compare` sets a tied variant aside."""
TABLE_HEAD = "| variant | rate | held-out loss | gap to the lowest |"
WIDTH = 720
LINE_HEIGHT = 19
BESTS, TIED, BEHIND = 0, 1, 2
STYLE = """
.head { font: 600 17px system-ui, -apple-system, "Segoe UI", Roboto, Arial, sans-serif; fill: #1f2328; }
.soft, .plot text { font: 12.5px system-ui, -apple-system, "Segoe UI", Roboto, Arial, sans-serif; fill: #59636f; }
.plot .grid { stroke: #dfe3e8; stroke-width: 1; }
.plot line[class^="line-"] { stroke-width: 2.5; stroke-linecap: round; }
.plot .line-0 { stroke: #1a7f37; } .plot .line-1 { stroke: #0969da; } .plot .line-2 { stroke: #8c959f; }
.plot circle.mark { stroke: none; } .plot .faint { opacity: 0.45; }
.plot circle.line-0 { fill: #1a7f37; } .plot circle.line-1 { fill: #0969da; } .plot circle.line-2 { fill: #8c959f; }
"""


def losses(candidate: CandidateSummary) -> dict[int, float]:
    """Return the held-out loss of a candidate's best settings by seed."""
    assert candidate.loss is not None
    best = min(one.loss for one in candidate.trials if one.share == 1 and one.loss is not None)
    first = next(one for one in candidate.trials if one.share == 1 and one.loss == best)
    return {first.seed: best} | {one.seed: one.loss for one in candidate.seed_runs if one.loss is not None}


def marks(summary: ComparisonSummary) -> list[Mark]:
    """Return the gap of each candidate to the lowest, in rising order."""
    recommendation = summary.recommendation
    assert recommendation is not None
    finished = [one for one in summary.candidates if one.loss_gap is not None]
    lowest = losses(next(one for one in finished if one.name == recommendation.lowest))
    drawn = []
    for one in finished:
        assert one.loss_gap is not None
        singles = [loss - lowest[seed] for seed, loss in losses(one).items() if seed in lowest]
        margin = None if one.name == recommendation.lowest else one.loss_gap_margin_together
        text = "lowest" if margin is None else f"{one.loss_gap.mean:+.3f} ± {margin:.3f}"
        color = BESTS if one.name == recommendation.name else TIED if one.tied else BEHIND
        rate = one.settings.get("training.learning_rate")
        drawn.append(Mark(f"{one.name} ({rate:g})", one.loss_gap.mean, margin, singles, color, text))
    return sorted(drawn, key=lambda mark: mark.value)


def of_summary(summary: ComparisonSummary) -> str:
    """Return the picture of a comparison."""
    recommendation, evidence = summary.recommendation, summary.evidence
    assert recommendation is not None and evidence is not None
    ties = f"Tied: {', '.join(recommendation.tied)}." if len(recommendation.tied) > 1 else "No other candidate is tied."
    groups = f" in {evidence.clusters} groups" if evidence.clusters != evidence.conversations else ""
    basis = (
        "Bars: 95 % intervals that hold for all pairs at once, over "
        f"{evidence.conversations} held-out conversations{groups} and {evidence.seeds} seeds. "
        "Small dots: single seeds. In parentheses: the learning rate that the search took."
    )
    return picture(recommendation.headline, [ties, basis], marks(summary))


def of_table(page: str) -> str:
    """Return the picture of the table in a page, without single seeds, which it does not have."""
    rows = page.partition(TABLE_HEAD)[2].partition("\n\n")[0].splitlines()[2:]
    drawn, forgetful = [], []
    for row in rows:
        name, rate, _, gap, tied, general, *_ = (cell.strip() for cell in row.strip("|").split("|"))
        value, _, margin = gap.partition(" ± ")
        mean, half = (0.0, None) if gap == "lowest" else (float(value), float(margin))
        if float(general.partition("(")[2].removesuffix(" %)")) > FORGETFUL:
            forgetful.append(name)
        is_behind = tied != "yes" or name in forgetful
        color = BESTS if name == "lora" else BEHIND if is_behind else TIED
        drawn.append(Mark(f"{name} ({rate})", mean, half, (), color, gap))
    ties = (
        f"All {len(drawn)} tie in loss. {' and '.join(forgetful)} (gray) forget more. Of the others, the one that "
        "every tool can load, merge and serve is recommended."
    )
    basis = (
        "SmolLM2-135M, 10 steps at the rate of `learning_rate: auto` (in parentheses). Bars: 95 % intervals that "
        "hold for all pairs at once, over 64 held-out conversations and 2 seeds. More would narrow them."
    )
    return picture("Recommended: lora. None is certainly better", [ties, basis], drawn)


def picture(headline: str, paragraphs: list[str], drawn: list[Mark]) -> str:
    """Return the SVG file."""
    lines = [line for paragraph in paragraphs for line in wrap(paragraph, 105)]
    top = 44 + LINE_HEIGHT * len(lines)
    plot = interval_plot(drawn, label="Gaps", x_name="held-out loss above the lowest, nats per token")
    height = float(str(plot).partition('viewBox="0 0 ')[2].partition('"')[0].split()[1])
    head = [Markup('<text class="head" x="16" y="28">{}</text>').format(headline)]
    for place, line in enumerate(lines):
        head.append(Markup('<text class="soft" x="16" y="{}">{}</text>').format(50 + LINE_HEIGHT * place, line))
    inner = str(plot).replace("<svg ", f'<svg x="0" y="{top}" width="{WIDTH}" height="{height:g}" ', 1)
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {top + height:g}" width="{WIDTH}" '
        f'height="{top + height:g}"><style>{STYLE}</style><rect width="100%" height="100%" fill="#ffffff"/>'
        f"{''.join(head)}{inner}</svg>\n"
    )


def main() -> None:
    """Draw one of the two."""
    if len(sys.argv) > 1:
        target, drawn = PICTURE, of_summary(ComparisonSummary.read(ComparisonFolder(Path(sys.argv[1]))))
    else:
        target, drawn = TABLE_PICTURE, of_table(PAGE.read_text(encoding="utf-8"))
    write_text(target, drawn)
    print(f"wrote {target}")


if __name__ == "__main__":
    main()
