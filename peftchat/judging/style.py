"""The win rate at equal style: how much of it answers owe to their length and their markdown.

Arena-Hard's style control (https://lmsys.org/blog/2024-08-28-style-control/): length, headers, list items and bold
parts of both answers are covariates of a logistic Bradley-Terry fit. With two models it is a logistic regression whose
intercept is their difference at equal style. Two things differ from the original, which ranks many models. A difference
is not centered, since zero means equal style here. The intercept has a ridge too, the same as the slopes, so that it is
finite for a model that always wins.
"""

import re
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

Floats = npt.NDArray[np.float64]

STYLE = ("length", "headers", "list items", "bold")
"""The covariates, in the order of all arrays here."""

_CODE = re.compile(r"```.*?(?:```|\Z)", re.DOTALL)
_HEADERS = re.compile(r"^#{1,6}\s", re.MULTILINE)
_LIST_ITEMS = re.compile(r"^[^\S\n]*(?:[-*+]|\d+\.)\s", re.MULTILINE)
_BOLD = re.compile(r"\*\*[^*\n]+\*\*|__[^_\n]+__")
_TOLERANCE, _MOST_STEPS = 1e-9, 50
_FARTHEST = 30.0
"""Log-odds beyond which a probability is 0 or 1 to machine precision."""


def style_of(text: str) -> tuple[int, int, int, int]:
    """Return the characters of an answer, and its headers, list items and bold parts outside of code blocks."""
    prose = _CODE.sub("", text)
    return len(text), *(len(pattern.findall(prose)) for pattern in (_HEADERS, _LIST_ITEMS, _BOLD))  # type: ignore[return-value]


def style_differences(answers: Sequence[tuple[str, str]]) -> Floats:
    """Return `(a - b) / (a + b + 1)` of each covariate, shape (questions, covariates).

    Args:
        answers: of A and of B to each question.
    """
    counts = np.array([[style_of(one) for one in pair] for pair in answers], dtype=np.float64)
    counts = counts.reshape(len(answers), 2, len(STYLE))
    return (counts[:, 0] - counts[:, 1]) / (counts[:, 0] + counts[:, 1] + 1)


@dataclass(frozen=True)
class StyleFit:
    """A logistic regression of wins on style, for one or several weightings of the questions.

    Attributes:
        rates: the win rate of A at equal style, shape (weightings,).
        slopes: change of the log-odds by a typical difference of each covariate, shape (weightings, covariates).
    """

    rates: Floats
    slopes: Floats


def fit_style(points: Floats, differences: Floats, weights: Floats) -> StyleFit:
    """Fit by Newton's method, with step halving, for all weightings at once.

    Args:
        points: 1 for a win of A, 0.5 for a tie, 0 for a loss; shape (questions,).
        differences: from `style_differences`, shape (questions, covariates).
        weights: how often each question counts, shape (weightings, questions); a bootstrap has one row per draw.
    """
    # In units of a typical difference, so that the ridge means the same for all; those that are always zero stay so.
    typical = np.sqrt((differences**2).mean(axis=0))
    scaled = differences / np.where(typical > 0, typical, 1.0)
    design = np.concatenate([np.ones((len(points), 1)), scaled], axis=1)
    total = weights.sum(axis=1, keepdims=True)
    shares = weights / total
    found = np.zeros((len(weights), design.shape[1]))
    # `C=1` of scikit-learn: the penalty weighs as much as one question.
    penalties = np.broadcast_to(1 / total, found.shape)
    loss = _loss(found, design, points, shares, penalties)
    for _ in range(_MOST_STEPS):
        expected = _logistic(found @ design.T)
        gradient = (shares * (expected - points)) @ design + penalties * found
        curvature = shares * expected * (1 - expected)
        hessian = np.einsum("dn,ni,nj->dij", curvature, design, design, optimize=True)
        diagonal = np.arange(design.shape[1])
        hessian[:, diagonal, diagonal] += penalties
        step = np.linalg.solve(hessian, gradient[..., None])[..., 0]
        size = np.ones((len(found), 1))
        for _ in range(_MOST_STEPS):
            tried = found - size * step
            new = _loss(tried, design, points, shares, penalties)
            rose = new > loss + _TOLERANCE
            if not rose.any():
                break
            size[rose] /= 2
        found, loss = tried, new
        if np.abs(size * step).max() < _TOLERANCE:
            break
    return StyleFit(_logistic(found[:, 0]), found[:, 1:])


def _loss(found: Floats, design: Floats, points: Floats, shares: Floats, penalties: Floats) -> Floats:
    odds = found @ design.T
    return (shares * (np.logaddexp(0.0, odds) - points * odds)).sum(axis=1) + 0.5 * (penalties * found**2).sum(axis=1)


def _logistic(odds: Floats) -> Floats:
    return np.asarray(1 / (1 + np.exp(-np.clip(odds, -_FARTHEST, _FARTHEST))))
