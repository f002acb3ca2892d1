"""The recommendation: ties, plain LoRA, forgetting, and what is said of them."""

from dataclasses import replace
from pathlib import Path

import pytest

from peftchat.comparing.candidates import Candidate
from peftchat.comparing.evidence import Evidence, forgetting_gap, read_clusters
from peftchat.comparing.outcomes import CandidateResult, Evaluation, RunResult
from peftchat.comparing.recommend import Recommendation, recommend
from peftchat.conversations import read_conversations
from tests.support.comparing import made


def advise(*results: CandidateResult, base: float = 3.0) -> Recommendation:
    advice = recommend(results, base)
    assert advice is not None
    return advice


def forgetting(result: CandidateResult, *parts: float) -> CandidateResult:
    """The same with these losses per token on parts of 64 tokens of plain text."""
    mean = sum(parts) / len(parts)
    return replace(
        result, evaluation=Evaluation(general_loss=mean, general_parts=tuple((64 * part, 64) for part in parts))
    )


def test_where_all_tie_plain_lora_is_recommended_and_the_ties_are_named() -> None:
    advice = advise(
        made("ia3", [2.00, 2.02, 2.01], seconds=1), made("lora", [2.01, 2.01, 2.01]), made("vera", [2.0] * 3)
    )
    assert advice.recommended.candidate.name == "lora"
    text = " ".join(advice.reasons)
    assert "These tie: ia3, lora, vera. All candidates tie." in text and "plain LoRA is recommended" in text
    assert "Tied with it and cheaper: ia3" in text


def test_plain_lora_yields_to_what_is_certainly_better() -> None:
    advice = advise(made("lora", [2.2, 2.21, 2.2]), made("dora", [2.0, 2.01, 2.0], seconds=100))
    assert advice.recommended.candidate.name == "dora" and [one.candidate.name for one in advice.tied] == ["dora"]
    assert "lora (+0.200 ± 0.0" in " ".join(advice.reasons)


def test_of_ties_the_one_that_certainly_forgets_more_is_set_aside() -> None:
    lora = forgetting(made("lora", [2.0, 2.01, 2.0]), 3.5, 3.6, 3.5, 3.6, 3.4)
    dora = forgetting(made("dora", [2.0, 2.0, 2.01], seconds=30), 3.0, 3.1, 3.0, 3.1, 2.9)
    advice = advise(lora, dora)
    assert advice.recommended.candidate.name == "dora"
    assert "lora is set aside: its loss on general text is +0.500" in " ".join(advice.reasons)
    # The same rise on two parts that disagree is noise.
    unsure = forgetting(lora, 4.6, 2.4)
    assert advise(unsure, forgetting(dora, 2.0, 4.0)).recommended.candidate.name == "lora"


def test_what_a_better_loss_costs_in_forgetting_is_stated() -> None:
    lora = forgetting(made("lora", [2.0, 2.01, 2.0]), 3.5, 3.6, 3.5, 3.6, 3.4)
    ia3 = forgetting(made("ia3", [2.2, 2.21, 2.2]), 3.0, 3.1, 3.0, 3.1, 2.9)
    advice = advise(lora, ia3)
    assert advice.recommended.candidate.name == "lora"
    (trade,) = (reason for reason in advice.reasons if reason.startswith("Trade-off"))
    assert "ia3 forgets less" in trade and "0.500" in trade and "+0.200" in trade


def test_a_candidate_that_lost_a_seed_is_not_compared() -> None:
    whole, lost = made("lora", [2.2, 2.2, 2.2]), made("dora", [2.0, 2.0, 2.0])
    failed = [RunResult(run.job, failure="no memory") for run in lost.seed_runs]
    advice = advise(whole, replace(lost, seed_runs=failed))
    assert advice.recommended.candidate.name == "lora"
    assert "Not compared, as a seed of theirs failed: dora." in advice.warnings


def test_one_seed_is_said_to_hide_the_noise_of_runs() -> None:
    advice = advise(made("lora", [2.01]), made("dora", [2.0]))
    assert advice.recommended.candidate.name == "lora"
    assert "do not contain the noise of runs" in advice.reasons[-1]


def test_the_threshold_is_a_setting_and_printed() -> None:
    lora, dora = made("lora", [2.05] * 3), made("dora", [2.0] * 3)
    strict, lax = recommend([lora, dora], 3.0), recommend([lora, dora], 3.0, negligible=0.1)
    assert strict is not None and lax is not None
    assert strict.recommended.candidate.name == "dora" and lax.recommended.candidate.name == "lora"
    assert "Differences up to 0.010 (0.5 %) count as equal." in strict.reasons[-1]
    assert "Differences up to 0.200 (10 %) count as equal." in lax.reasons[-1]


def test_runs_without_losses_by_conversation_tie() -> None:
    old = [replace(made(name, [loss] * 3), seed_runs=()) for name, loss in (("lora", 2.5), ("dora", 2.0))]
    old = [replace(one, trials=[replace(run, held_out=()) for run in one.trials]) for one in old]
    advice = advise(*old)
    assert len(advice.tied) == 2 and "Runs of an older version" in advice.warnings[0]


def test_losses_of_other_conversations_are_not_paired() -> None:
    lora, dora = made("lora", [2.0]), made("dora", [2.0])
    other = [replace(one, source=f"other{one.source}") for one in dora.trials[0].held_out]
    dora = replace(dora, trials=[replace(dora.trials[0], held_out=other)])
    evidence = Evidence.of([lora, dora])
    assert evidence is not None and not evidence.by_conversation


def test_branches_of_a_tree_are_one_cluster_and_greetings_are_not(tmp_path: Path) -> None:
    file = tmp_path / "eval.jsonl"
    starts = ["one tree"] * 3 + ["another"] * 2 + ["hello"] * 40
    turn = '{{"messages": [{{"role": "user", "content": "{}"}}, {{"role": "assistant", "content": "{}"}}]}}\n'
    file.write_text("".join(turn.format(start, number) for number, start in enumerate(starts)), encoding="utf-8")
    clusters = read_clusters(read_conversations(str(file), format="messages"))
    assert list(clusters) == [f"{file}:{line}" for line in range(1, 46)]
    values = list(clusters.values())
    assert len(set(values[:5])) == 2 and len(set(values[5:])) == 40


def test_forgetting_has_no_interval_where_only_means_are_known() -> None:
    gap = forgetting_gap(made("a", [2.0]), made("b", [2.0]))
    assert gap is not None and gap.mean == 0 and gap.margin is None
    candidate = Candidate("c", "lora", {})
    assert forgetting_gap(made("a", [2.0]), CandidateResult(candidate)) is None


@pytest.mark.parametrize("name", ["qlora", "dora"])
def test_without_plain_lora_the_cheapest_tie_is_taken(name: str) -> None:
    other = made(name, [2.0] * 3, seconds=30)
    if name == "qlora":
        other = replace(other, candidate=Candidate("qlora", "lora", {"method": "qlora"}))
    assert advise(other, made("vera", [2.001] * 3)).recommended.candidate.name == "vera"
