"""Regions, means over them, and differences of two runs by the same draws."""

import dataclasses

import numpy as np
import pytest

from jaxmed.errors import UserError
from jaxmed.evaluate import compare, parts, scores, text
from jaxmed.evaluate.judging import Judged
from jaxmed.evaluate.studies import Study
from jaxmed.report import comparison

REGIONS = ("chest", "abdomen", "pelvis")
WORDS = ["no", "small", "nodule", "effusion", "right", "left", "lobe", "heart", "liver", "cyst", "normal", "."]


def made_up(volumes, seed, error):
    """Reports of regions: the pelvis in every other volume alone."""
    random = np.random.default_rng(seed)
    found = []
    for i in range(volumes):
        for region in REGIONS[: 2 + i % 2]:
            reference = np.random.default_rng([i, len(region)]).choice(WORDS, 11)
            answer = np.where(random.random(11) < error, random.choice(WORDS, 11), reference)
            found.append(Study(f"{i}/{region}", f"v{i}.nii.gz", ("q",), (" ".join(answer),), (" ".join(reference),), region))
    return found


def run(name, studies, judged=(), resamples=200):
    found = scores.score(studies, resamples=resamples, scorers=text.scorers())
    return compare.Run(name, f"{name}.json", studies, found, parts.parts(studies, found.statistics, judged, "", resamples))


def test_volumes_are_resampled_whole_and_regions_count_alike_in_their_mean():
    studies = made_up(10, 1, 0.4)
    assert scores.units(studies).max() == 9 and len(studies) == 25
    for weights in scores.weights(scores.units(studies), 60, 3):
        for i in range(10):
            own = weights[:, [study.image == f"v{i}.nii.gz" for study in studies]]
            assert (own == own[:, :1]).all()
    found = run("a", studies)
    rouge = np.array([row["rouge_l"] for row in found.scores.per_study])
    means = {region: rouge[[s.region == region for s in studies]].mean() for region in REGIONS}
    content = parts.to_json(found.parts)["regions"]
    for region in REGIONS:
        assert content["groups"][region]["scores"]["rouge_l"] == pytest.approx(means[region])
    assert content["groups"]["pelvis"]["records"] == 5
    assert content["mean"]["scores"]["rouge_l"] == pytest.approx(np.mean(list(means.values())))
    assert found.scores.corpus["rouge_l"] == pytest.approx(rouge.mean())
    written = scores.to_json(found.scores)
    assert written["studies"] == 10 and written["records"] == 25
    bleu = scores.corpus_scores(
        scores.statistics(*[[getattr(s, k) for s in studies if s.region == "chest"] for k in ("answers", "references")])
    )
    assert content["groups"]["chest"]["scores"]["bleu_4"] == pytest.approx(bleu["bleu_4"])


def test_a_judges_values_are_averaged_by_region_over_those_it_judged():
    studies = made_up(4, 1, 0.4)  # chest, abdomen; chest, abdomen, pelvis; twice
    values = np.array([0.2, 0.5, 0.4, np.nan, 0.9, 0.6, 0.7, 0.8, 0.1, 0.3])
    regions = [study.region for study in studies]
    found = run("a", studies, [Judged("green", "j", values, facts={"version": "challenge"})]).parts
    content = parts.to_json(found)
    by_hand = {r: np.nanmean([v for v, region in zip(values, regions, strict=True) if region == r]) for r in REGIONS}
    assert {r: content["regions"]["groups"][r]["scores"]["green"] for r in REGIONS} == pytest.approx(by_hand)
    assert content["regions"]["mean"]["scores"]["green"] == pytest.approx(np.mean(list(by_hand.values())))
    assert content["green"]["score"] == pytest.approx(np.nanmean(values)) and content["green"]["version"] == "challenge"
    assert parts.columns(found, studies)["green_challenge"][0] == 0.2


def test_records_that_are_no_parts_are_resampled_by_themselves():
    plain = [dataclasses.replace(study, region="") for study in made_up(10, 1, 0.4)]
    assert scores.units(plain).tolist() == list(range(25)) and "records" not in scores.to_json(run("a", plain).scores)


def test_patients_are_resampled_with_all_their_volumes():
    """Reconstructions of one scan share a report: twice the volumes are not twice the evidence."""
    once = [dataclasses.replace(s, region="", patient=f"p{s.image}") for s in made_up(20, 1, 0.4) if s.region == "chest"]
    twice = [dataclasses.replace(s, id=f"{s.id}/{n}", image=f"{s.image}.{n}") for n in range(2) for s in once]
    strangers = [dataclasses.replace(s, patient="") for s in twice]
    widths = [np.ptp(run("a", made).parts.figures["rouge_l"].interval) for made in (once, twice, strangers)]
    assert widths[0] == pytest.approx(widths[1]) and widths[2] < 0.85 * widths[0]
    assert scores.units(twice).tolist() == [*range(20), *range(20)]
    written = scores.to_json(run("a", twice).scores)
    assert (written["studies"], written["patients"]) == (40, 20) and "patients" not in scores.to_json(
        run("a", strangers).scores
    )
    assert scores.counted(run("a", twice).scores) == "40 studies of 20 patients"
    parts_of_one = [dataclasses.replace(s, region="chest") for s in twice] + [dataclasses.replace(twice[0], region="pelvis")]
    assert scores.counted(run("a", parts_of_one).scores) == "40 studies of 20 patients"


def test_difference_interval_and_p():
    a, better, same = made_up(40, 1, 0.5), made_up(40, 2, 0.2), made_up(40, 1, 0.5)
    first = run("a", a)
    found = compare.compare(first, run("b", better)).all["rouge_l"]
    per_study = [np.array([row["rouge_l"] for row in r.scores.per_study]) for r in (first, run("b", better))]
    assert found.value == pytest.approx(per_study[1].mean() - per_study[0].mean())
    assert 0 < found.interval[0] < found.value < found.interval[1] and found.p == pytest.approx(2 / 201)
    assert found.wins == (per_study[1] > per_study[0] + 1e-9).sum() and found.wins + found.losses + found.ties == 100
    # the draws of both runs are the same: by hand, over volumes
    units = scores.units(a)
    totals = np.concatenate(list(scores.weights(units, 200, 0)))
    differences = totals @ (per_study[1] - per_study[0]) / totals.sum(1)
    np.testing.assert_allclose(found.interval, np.percentile(differences, [2.5, 97.5]))
    text = comparison.verdicts([first, run("b", better)], [compare.compare(first, run("b", better))])[0].text
    assert text.endswith("On the whole b is better.") and scores.few_notice(first.scores) == []
    nothing = compare.compare(first, run("c", same))
    assert nothing.all["bleu_4"].interval == (0, 0) and nothing.all["bleu_4"].p == 1 and nothing.all["bleu_4"].ties == 100
    turned = compare.compare(run("b", better), first).all["rouge_l"]
    assert turned.value == pytest.approx(-found.value) and (turned.wins, turned.losses) == (found.losses, found.wins)


def test_regions_of_a_comparison():
    one = compare.compare(run("a", made_up(30, 1, 0.5)[::-1]), run("b", made_up(30, 2, 0.3)[::-1]))
    assert list(one.regions) == [*REGIONS, "mean"]  # whichever comes first
    values = [one.regions[region]["rouge_l"].value for region in REGIONS]
    assert one.regions["mean"]["rouge_l"].value == pytest.approx(np.mean(values))
    assert one.regions["pelvis"]["rouge_l"].wins + one.regions["pelvis"]["rouge_l"].losses <= 15


def test_a_resample_has_the_mean_of_the_groups_that_it_has():
    """Of thirty types with one question each a resample never has all."""
    made = [
        Study(f"q{i}", f"v{i}.npy", ("?",), ("AB"[i % 3 > 0],), ("A",), "", f"type {i}", {"A": "x", "B": "y"}, "A")
        for i in range(30)
    ]
    first, other = run("a", made), run("b", [dataclasses.replace(study, answers=("A",)) for study in made])
    right = np.array([study.answers == ("A",) for study in made])
    totals = np.concatenate(list(scores.weights(scores.units(made), 200, 0))) > 0
    by_hand = (totals & right).sum(1) / totals.sum(1)
    mean = parts.to_json(first.parts)["question_types"]["mean"]
    assert mean["intervals"]["accuracy"] == pytest.approx(list(np.percentile(by_hand, [2.5, 97.5])))
    gain, limits = compare.compare(first, other).types["mean"]["accuracy"], np.percentile(1 - by_hand, [2.5, 97.5])
    assert gain.value == pytest.approx(20 / 30) and gain.interval == pytest.approx(tuple(limits))
    lone = compare.compare(run("a", made, resamples=1), run("b", made, resamples=1))
    absent = [one for one in lone.types.values() if "interval" not in one["accuracy"].json()]
    assert absent  # a group that the one resample lacks: nothing is known of its difference, and that is said


def test_studies_of_all_runs_in_the_first_ones_order():
    a, b = made_up(6, 1, 0.4), made_up(6, 2, 0.4)
    shared, notices = compare.shared([("a", a[2:]), ("b", b[::-1][3:])])
    assert [s.id for s in shared[0]] == [s.id for s in shared[1]] == [s.id for s in a[2:-3]] and "5 studies" in notices[0]
    with pytest.raises(UserError, match="share no study"):
        compare.shared([("a", a[:2]), ("b", b[3:])])
    with pytest.raises(UserError, match="twice"):
        compare.shared([("a", [a[0], a[0]]), ("b", b)])


def test_the_farthest_studies_come_first():
    a, b = made_up(12, 1, 0.5), made_up(12, 2, 0.1)
    runs = [run("a", a), run("b", b)]
    order = compare.most_different(runs, "rouge_l")
    gaps = np.abs(compare.per_study(runs[0])["rouge_l"] - compare.per_study(runs[1])["rouge_l"])[order]
    assert (np.diff(gaps) <= 0).all() and gaps[0] > gaps[-1]
