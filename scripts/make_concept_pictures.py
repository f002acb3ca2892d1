"""Draw the pictures of the concept pages: `python scripts/make_concept_pictures.py [NAME…] [--runs RUN RUN]`.

Names are masks, packing, tokens, merging, intervals and zero; all of them unless some are named. Every figure is what
peftchat's own functions give: masks and packs for the recipe of `make demo`, the others for finished runs.
docs/concept-intervals.md and docs/concept-zero.md have the commands of these runs.
"""

import argparse
from pathlib import Path

import concept_measures as measures
import numpy as np
from concept_svg import CHARACTER, COLORS, INNER, MARGIN, WIDTH, Axis, Drawing, LogAxis, flow_tokens

PICTURES = Path("docs/pictures")
POLICIES = (
    ("answers", "the default: each answer and the token that ends it"),
    ("last_answer", "the last answer only"),
    ("answers_and_headers", "also what stands around an answer"),
    ("everything", "all of it: the loss that a mask is there to avoid"),
)


def masks(_: list[Path]) -> None:
    """Draw one conversation under each value of `chat.loss_on`."""
    drawing = Drawing("The tokens of a conversation under four values of chat.loss_on; trained tokens are green")
    for loss_on, note in POLICIES:
        tokens = measures.shown_tokens(loss_on)
        trained = sum(is_trained for _, is_trained in tokens)
        drawing.heading(f"loss_on: {loss_on}", f"{note}; {trained} of {len(tokens)} tokens are trained")
        flow_tokens(drawing, tokens)
    drawing.write(PICTURES / "concept-masks.svg")


def packing(_: list[Path]) -> None:
    """Draw real conversations padded and packed, the positions of a pack, and what leaks between conversations."""
    found = measures.packed_examples()
    drawing = Drawing("Conversations padded and packed; positions restart; nothing leaks between conversations")
    longest = int(found.lengths.max())
    scale = INNER / found.capacity
    padded = longest * len(found.lengths)
    drawing.heading(
        f"Padded: {len(found.lengths)} rows, each as long as the longest conversation",
        f"{1 - found.lengths.sum() / padded:.0%} of the tokens are padding",
    )
    for number, length in enumerate(found.lengths):
        drawing.box(MARGIN, drawing.y, longest * scale, 3.5, "plain")
        drawing.box(MARGIN, drawing.y, int(length) * scale, 3.5, f"f{number % COLORS}", f"{length} tokens")
        drawing.y += 5
    packed = found.capacity * len(found.packs)
    drawing.heading(
        f"Packed: {len(found.packs)} rows of {found.capacity} tokens",
        f"{1 - found.lengths.sum() / packed:.0%} of the tokens are padding; no conversation is cut",
    )
    for pack in found.packs:
        x = float(MARGIN)
        drawing.box(x, drawing.y, INNER, 13, "plain")
        for number in pack:
            width = int(found.lengths[number]) * scale
            drawing.box(x, drawing.y, width - 1, 13, f"f{number % COLORS}", f"{found.lengths[number]} tokens")
            x += width
        drawing.y += 17
    _isolation(drawing)
    drawing.write(PICTURES / "concept-packing.svg")


def _isolation(drawing: Drawing) -> None:
    leak = measures.leak()
    count = len(leak.positions)
    left, right, height = MARGIN + 44, WIDTH - MARGIN, 90

    def x(place: float) -> float:
        return left + (right - left) * place / count

    def band(y: float) -> None:
        for number, (start, stop) in enumerate(zip(leak.starts, [*leak.starts[1:], count], strict=True)):
            drawing.box(x(start), y, x(stop) - x(start) - 1, 7, f"f{number % COLORS}")

    drawing.heading("Positions begin again with each conversation", "position_ids of one pack, token by token")
    top, most = drawing.y, max(leak.positions)
    for value in (0, 50, 100):
        y = top + height - height * value / most
        drawing.line(left, y, right, y, "rule")
        drawing.text(left - 6, y + 4, str(value), "soft", "end")
    drawing.path([(x(place), top + height - height * value / most) for place, value in enumerate(leak.positions)], "s1")
    band(top + height + 4)
    drawing.y = top + height + 14
    drawing.heading(
        "Conversations do not see each other",
        "every token of the first one was replaced: how far do the logits move?",
    )
    top, low, high = drawing.y + 2, -6, 2
    rows = {exponent: top + height * (high - exponent) / (high - low) for exponent in range(low, high + 1)}
    for exponent in range(low + 1, high + 1, 2):
        drawing.line(left, rows[exponent], right, rows[exponent], "rule")
        drawing.text(left - 6, rows[exponent] + 4, f"{10.0**exponent:g}", "soft", "end")
    drawing.line(left, rows[low] + 8, right, rows[low] + 8, "rule")
    drawing.text(left - 6, rows[low] + 12, "0", "soft", "end")
    for moves, style, name in (
        (leak.one_sequence, "f2", "as one sequence"),
        (leak.isolated, "f1", "as peftchat trains"),
    ):
        for number, move in enumerate(moves.tolist()):
            exponent = np.log10(move) if move > 0 else low
            y = rows[low] + 8 if move == 0 else top + height * (high - min(max(exponent, low), high)) / (high - low)
            drawing.dot(x(number + 0.5), y, style, 1.6)
        beyond = moves[leak.starts[1] :].max()
        label_y = rows[low] - 6 if style == "f1" else rows[-1] + 16
        words = f"at most {beyond:.2g}" if beyond else "exactly 0"
        drawing.text(x(count * 0.6), label_y, f"{name}: {words} behind the first one", "soft", "middle")
    band(rows[low] + 18)
    drawing.y = rows[low] + 28


def tokens(runs: list[Path]) -> None:
    """Draw how far rows of the embedding moved, and the probability of the end token before and after."""
    found = measures.token_moves(runs[0])
    drawing = Drawing("How far added tokens moved, and how probable the end of an answer became")
    drawing.heading(
        "How far each row of the embedding moved",
        "L2 distance, first to last step; in parentheses: occurrences in the data",
    )
    most = max(move for _, move in found.moved)
    for name, move in found.moved:
        drawing.text(MARGIN + 150, drawing.y + 12, name, "mono" if name.startswith("<") else "soft", "end")
        drawing.box(MARGIN + 160, drawing.y, max(1, (INNER - 230) * move / most), 15, "f0" if move else "plain")
        drawing.text(
            MARGIN + 168 + (INNER - 230) * move / most, drawing.y + 12, f"{move:.3f}" if move else "exactly 0", "soft"
        )
        drawing.y += 21
    drawing.heading(
        "Does the model end its turn?",
        f"probability of <|end|> where each of {len(found.before)} held-out answers ends",
    )
    axis = LogAxis(-8, 0, left=MARGIN + 100)
    top = drawing.y
    axis.draw(drawing, top, top + 64, "probability", step=2)
    for number, (name, values) in enumerate((("first step", found.before), ("last step", found.after))):
        y = top + 20 + 28 * number
        drawing.text(MARGIN + 90, y + 4, name, "soft", "end")
        for value in values:
            drawing.dot(axis.x(value), y, f"f{(2, 0)[number]} faint", 4, f"{value:.2g}")
        median = float(np.median(values))
        drawing.line(axis.x(median), y - 9, axis.x(median), y + 9, f"s{(2, 0)[number]}", 3)
    drawing.y = top + 100
    drawing.write(PICTURES / "concept-tokens.svg")


def merging(runs: list[Path]) -> None:
    """Draw how far logits of merged models are from base and adapter, beside what the adapter does."""
    found = measures.merge_distances(runs[0])
    drawing = Drawing("Logits of merged models against base and adapter, beside the limits")
    drawing.heading(
        "How far are two sets of logits apart?",
        f"largest difference as a share of the range, over {found.positions} positions",
        "bar: the limit, beyond which the merge fails",
    )
    axis, top = LogAxis(-7, 0), drawing.y
    axis.draw(drawing, top, top + 30 * len(found.rows), "share of the range of logits")
    for number, row in enumerate(found.rows):
        y = top + 15 + 30 * number
        drawing.text(axis.left - 10, y + 4, row.name, "soft", "end")
        style = "f2" if row.limit is None else "f0"
        drawing.dot(axis.x(row.value), y, style, 5, f"{row.value:.3g}")
        side = "start" if axis.x(row.value) < (axis.left + axis.right) / 2 else "end"
        drawing.text(axis.x(row.value) + (10 if side == "start" else -10), y + 4, f"{row.value:.2g}", "", side)
        if row.limit is not None:
            drawing.line(axis.x(row.limit), y - 9, axis.x(row.limit), y + 9, "limit", 3)
    drawing.y = top + 30 * len(found.rows) + 36
    drawing.write(PICTURES / "concept-merging.svg")


def intervals(runs: list[Path]) -> None:
    """Draw held-out losses by conversation of two runs, and their paired differences."""
    found = measures.paired_losses(runs[0], runs[1])
    drawing = Drawing("Losses of two runs by conversation, each with its interval, and their paired difference")
    drawing.heading(
        "Each run alone",
        f"held-out loss of {len(found.first)} conversations (dots); mean and 95 % interval (bar)",
    )
    top = drawing.y
    axis = Axis(0, float(np.ceil(max(found.first.max(), found.second.max()))))
    axis.draw(drawing, top, top + 88, "nats per token", np.arange(axis.low, axis.high + 0.5), ".0f")
    for number, (name, values, own) in enumerate(
        ((runs[0].name, found.first, found.alone[0]), (runs[1].name, found.second, found.alone[1]))
    ):
        _strip(drawing, axis, top + 14 + 44 * number, name, values, own, number)
    drawing.y = top + 120
    drawing.heading(
        f"Conversation by conversation: {runs[1].name} minus {runs[0].name}",
        "the same conversations, so how hard each one is drops out",
    )
    top = drawing.y
    reach = float(np.ceil(np.abs(found.differences).max() * 4) / 4)
    axis = Axis(-reach, reach)
    axis.draw(drawing, top, top + 44, "nats per token", np.linspace(-reach, reach, 5), "+.2f")
    drawing.line(axis.x(0), top, axis.x(0), top + 44, "limit", 2)
    _strip(drawing, axis, top + 14, "difference", found.differences, found.paired, 3)
    drawing.y = top + 80
    drawing.write(PICTURES / "concept-intervals.svg")


def _strip(
    drawing: Drawing, axis: Axis, y: float, name: str, values: np.ndarray, own: tuple[float, float, float], color: int
) -> None:
    mean, low, high = own
    drawing.text(axis.left - 10, y + 12, name, "soft", "end")
    for value in values:
        drawing.dot(axis.x(float(value)), y, f"f{color} faint", 3, f"{value:.3f}")
    drawing.line(axis.x(low), y + 16, axis.x(high), y + 16, f"s{color}", 3)
    drawing.dot(axis.x(mean), y + 16, f"f{color}", 5)
    words = f"{mean:.3f} [{low:.3f}, {high:.3f}]"
    if axis.x(high) + CHARACTER * len(words) < axis.right:
        drawing.text(axis.x(high) + 8, y + 20, words, "soft")
    else:
        drawing.text(axis.x(low) - 8, y + 20, words, "soft", "end")


def zero(folders: list[Path]) -> None:
    """Draw what a process holds under each strategy."""
    found = measures.held_bytes(folders)
    drawing = Drawing("Bytes of weights and optimizer that one process holds, by strategy")
    drawing.heading("What one process holds", "full fine-tuning in float32 with AdamW, as run.json measured it")
    x = float(MARGIN)
    for number, part in enumerate(("weights", "optimizer: AdamW's moments, master weights")):
        drawing.box(x, drawing.y, 12, 12, f"f{number}")
        drawing.text(x + 17, drawing.y + 11, part, "soft")
        x += 40 + CHARACTER * len(part)
    drawing.y += 24
    scale = (INNER - 220) / max(one.weights + one.optimizer for one in found)
    for one in found:
        drawing.text(MARGIN + 130, drawing.y + 14, one.name, "soft", "end")
        drawing.box(MARGIN + 140, drawing.y, one.weights * scale, 19, "f0")
        drawing.box(MARGIN + 140 + one.weights * scale, drawing.y, one.optimizer * scale, 19, "f1")
        end = MARGIN + 146 + (one.weights + one.optimizer) * scale
        drawing.text(end, drawing.y + 14, f"{(one.weights + one.optimizer) / 1e6:.2f} MB", "soft")
        drawing.y += 26
    drawing.write(PICTURES / "concept-zero.svg")


ALL = {one.__name__: one for one in (masks, packing, tokens, merging, intervals, zero)}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("names", nargs="*", choices=[*ALL, []])
    parser.add_argument("--runs", nargs=2, type=Path, default=[Path("runs/rate-1e-2"), Path("runs/rate-5e-3")])
    strategies = [Path("runs", name) for name in ("single", "ddp", "zero2", "zero3")]
    parser.add_argument("--strategies", nargs="+", type=Path, default=strategies)
    options = parser.parse_args()
    for name in options.names or ALL:
        ALL[name](options.strategies if name == "zero" else options.runs)


if __name__ == "__main__":
    main()
