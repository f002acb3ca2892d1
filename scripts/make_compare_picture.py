"""Draw the picture of a comparison: `python scripts/make_compare_picture.py COMPARISON [PICTURE]`.

docs/compare.md has the commands that made the comparisons of its own picture and of the README's.
"""

import sys
from pathlib import Path
from textwrap import wrap

from markupsafe import Markup

from peftchat.comparing.candidates import format_lr
from peftchat.comparing.comparison_folder import ComparisonFolder
from peftchat.comparing.results import CandidateSummary, ComparisonSummary
from peftchat.files import write_text
from peftchat.reports.svg import Mark, interval_plot

PICTURE = Path("docs/pictures/compare.svg")
WIDTH = 720
LINE_HEIGHT = 19
BESTS, TIED, BEHIND = 0, 1, 2
STYLE = """
.head { font: 600 17px system-ui, -apple-system, "Segoe UI", Roboto, Arial, sans-serif; fill: #1f2328; }
.soft, .plot text { font: 12.5px system-ui, -apple-system, "Segoe UI", Roboto, Arial, sans-serif; fill: #59636f; }
.plot .grid { stroke: #dfe3e8; stroke-width: 1; }
.plot line[class^="line-"] { stroke-width: 2.5; stroke-linecap: round; }
.plot .line-0 { stroke: #1a7f37; } .plot .line-1 { stroke: #0969da; } .plot .line-2 { stroke: #8c959f; }
.plot circle.mark { stroke: none; } .plot circle.faint { stroke: #ffffff; }
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
        rate = float(one.settings["training.learning_rate"])
        drawn.append(Mark(f"{one.name} ({format_lr(rate)})", one.loss_gap.mean, margin, singles, color, text))
    return sorted(drawn, key=lambda mark: mark.value)


def of_summary(summary: ComparisonSummary) -> str:
    """Return the picture of a comparison."""
    recommendation, evidence = summary.recommendation, summary.evidence
    assert recommendation is not None and evidence is not None
    ties = f"Tied: {', '.join(recommendation.tied)}." if len(recommendation.tied) > 1 else "No other candidate is tied."
    groups = f" in {evidence.clusters} groups" if evidence.clusters != evidence.conversations else ""
    length = f"Each run: {summary.budget}. " if summary.budget else ""
    basis = (
        f"{length}Bars: 95 % intervals that hold for all pairs at once, over "
        f"{evidence.conversations} held-out conversations{groups} and {evidence.seeds} seeds. "
        "Small dots: single seeds. In parentheses: the learning rate that the search took."
    )
    return picture(recommendation.headline, [ties, basis], marks(summary))


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
    """Draw the picture of the folder that is named first, into the file that is named second."""
    folder, *target = map(Path, sys.argv[1:])
    picture_file = target[0] if target else PICTURE
    write_text(picture_file, of_summary(ComparisonSummary.read(ComparisonFolder(folder))))
    print(f"wrote {picture_file}")


if __name__ == "__main__":
    main()
