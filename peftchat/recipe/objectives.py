"""The objectives of a recipe: what is learned from, and the options of each."""

from typing import Literal

from pydantic import Field

from peftchat.strict_model import StrictModel

Objective = Literal["sft", "dpo", "orpo", "simpo", "cpo", "kto"]

DpoLoss = Literal["sigmoid", "hinge", "ipo", "robust"]
KtoLoss = Literal["kto", "apo_zero_unpaired"]
CpoLoss = Literal["sigmoid", "hinge"]

PAIR_OBJECTIVES: tuple[Objective, ...] = ("dpo", "orpo", "simpo", "cpo", "kto")
"""The objectives that learn from pairs of a chosen and a rejected answer, or from labeled answers."""

LABEL_OBJECTIVES: tuple[Objective, ...] = ("kto",)
"""Those of them that learn from labeled answers."""

REFERENCE_OBJECTIVES: tuple[Objective, ...] = ("dpo", "kto")
"""Those of them that compare the model with a reference."""


class DpoSection(StrictModel):
    """Direct preference optimization (Rafailov et al., 2023, https://arxiv.org/abs/2305.18290)."""

    beta: float = Field(
        0.1,
        gt=0,
        description="How strongly the model is held to its reference: higher is closer. The default is TRL's.",
    )
    loss_type: DpoLoss = Field(
        "sigmoid",
        description="The loss of a pair: `sigmoid` (DPO), `hinge` (SLiC, https://arxiv.org/abs/2305.10425), `ipo` "
        "(https://arxiv.org/abs/2310.12036, by token) or `robust` (https://arxiv.org/abs/2403.00409).",
    )
    label_smoothing: float = Field(
        0.0,
        ge=0,
        lt=0.5,
        description="Share of the pairs that may be the wrong way round, for `loss_type: robust`.",
    )
    rpo_alpha: float | None = Field(
        None,
        gt=0,
        description="Weight of the chosen answers' mean loss per token, which is added to that of the pairs "
        "(https://arxiv.org/abs/2404.19733). It keeps their likelihood from falling.",
    )


class OrpoSection(StrictModel):
    """Odds ratio preference optimization (Hong et al., 2024, https://arxiv.org/abs/2403.07691)."""

    beta: float = Field(
        0.1,
        gt=0,
        description="Weight of the odds ratio beside the chosen answers' mean loss per token; lambda in the paper. The "
        "default is TRL's.",
    )


class SimpoSection(StrictModel):
    """Simple preference optimization (Meng et al., 2024, https://arxiv.org/abs/2405.14734)."""

    beta: float = Field(
        2.0, gt=0, description="Scale of the mean log-probabilities per token. The default is the paper's."
    )
    gamma: float = Field(
        1.0,
        ge=0,
        description="The margin that the chosen answer's reward should have; half of `beta`, as the authors advise.",
    )


class CpoSection(StrictModel):
    """Contrastive preference optimization (Xu et al., 2024, https://arxiv.org/abs/2401.08417)."""

    beta: float = Field(0.1, gt=0, description="Scale of the log-probabilities. The default is TRL's.")
    loss_type: CpoLoss = Field("sigmoid", description="The loss of a pair: `sigmoid` (CPO) or `hinge`.")
    alpha: float = Field(
        1.0,
        ge=0,
        description="Weight of the chosen answers' mean loss per token; `cpo_alpha` in TRL, whose default it is.",
    )


class KtoSection(StrictModel):
    """Kahneman-Tversky optimization, from single labeled answers (Ethayarajh et al., 2024,
    https://arxiv.org/abs/2402.01306).
    """

    beta: float = Field(
        0.1,
        gt=0,
        description="How strongly the model is held to its reference: higher is closer. The default is TRL's.",
    )
    loss_type: KtoLoss = Field(
        "kto",
        description="The loss of an answer: `kto`, or `apo_zero_unpaired` (https://arxiv.org/abs/2408.06266), which "
        "has no KL term.",
    )
    desirable_weight: float = Field(
        1.0,
        ge=0,
        description="Weight of good answers; lambda of the paper, which advises 1 to 1.33 times the ratio of bad to "
        "good ones. The default is TRL's.",
    )
    undesirable_weight: float = Field(1.0, ge=0, description="Weight of bad answers. The default is TRL's.")
