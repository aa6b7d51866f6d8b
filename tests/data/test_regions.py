"""The region classifier on hand-labelled sentences, its rules one by one, and models in its place."""

import json
from pathlib import Path

import pytest

from jaxmed.data.records import Reading, load_records
from jaxmed.data.region_files import from_spans, write_regions
from jaxmed.data.regions import REGIONS, lexicon, region_of, sentences_of, split_report
from jaxmed.errors import BadRecords, UserError

REPORTS = json.loads((Path(__file__).parents[1] / "golden/regions/sentences.json").read_text())
"""[[{"sentence", "region"}]]: labelled by hand, sentences without an organ by the one before them"""


def test_hand_labelled_sentences():
    wrong, count = [], 0
    for report in REPORTS:
        sentences = [item["sentence"] for item in report]
        assert sentences_of(" ".join(sentences)) == sentences
        region = "chest"
        for item, found in zip(report, lexicon(sentences), strict=True):
            region = found or region
            count += 1
            wrong += [(item["sentence"], region)] if region != item["region"] else []
    assert count >= 100 and all(sum(i["region"] == r for rep in REPORTS for i in rep) >= 20 for r in REGIONS)
    assert len(wrong) <= 0.05 * count, wrong


def test_reports_split_as_labelled():
    for report in REPORTS:
        wanted = {r: " ".join(i["sentence"] for i in report if i["region"] == r) for r in REGIONS}
        assert split_report(" ".join(i["sentence"] for i in report)) == {r: text for r, text in wanted.items() if text}


RULES = [
    ("The pelvis of the left kidney is wide.", "abdomen"),  # the longest term, not `pelvis`
    ("Right renal pelvis and pelvic fat.", "pelvis"),  # a region's own word beside an organ
    ("Liver cysts, lung nodules, a splenic cyst.", "abdomen"),  # majority
    ("Lung nodules and liver cysts.", "chest"),  # first among equals
    ("Lung, heart and trachea are outside of this abdominal scan.", "abdomen"),  # own word over three organs
    ("Coronal images.", ""),
    ("It is unchanged since 2019.", ""),
    ("LIVER NORMAL.", "abdomen"),
    ("The lad was seen in March.", ""),  # an abbreviation is upper case
]


@pytest.mark.parametrize(("sentence", "region"), RULES)
def test_rules(sentence, region):
    assert region_of(sentence) == region


def test_sentences():
    text = "Nodule of 3.5 mm, e.g. in the liver vs. spleen (approx. 2 cm). It grew!  Stable?\n\nNo. 4 is\nold: No. The end"
    assert sentences_of(text) == [
        "Nodule of 3.5 mm, e.g. in the liver vs. spleen (approx. 2 cm).",
        "It grew!",
        "Stable?",
        "No. 4 is old: No.",
        "The end",
    ]
    assert sentences_of("Findings:\n1. Lungs clear.\n2. Liver normal.") == ["Findings:", "1. Lungs clear.", "2. Liver normal."]
    assert sentences_of(" \n") == []


def test_sentences_without_a_region_follow_the_one_before():
    text = "No comparison. Uterus normal. It is anteverted. Lungs clear."
    assert split_report(text) == {"chest": "No comparison. Lungs clear.", "pelvis": "Uterus normal. It is anteverted."}
    assert split_report("No comparison. It is old.", start="abdomen") == {"abdomen": "No comparison. It is old."}
    assert split_report("") == {}


def test_any_callable_serves_and_is_checked():
    assert split_report("Aa. Bb. Cc.", lambda sentences: ["", "pelvis", ""]) == {"chest": "Aa.", "pelvis": "Bb. Cc."}
    for bad in (["chest"], ["chest", "head", ""]):
        with pytest.raises(UserError, match="one of chest, abdomen, pelvis"):
            split_report("Aa. Bb. Cc.", lambda sentences, bad=bad: bad)


def test_what_a_model_wrote_serves(tmp_path):
    path = tmp_path / "spans.jsonl"
    lines = [
        {"sentence": "A  is\nwide.", "region": "pelvis"},
        {"sentence": "B is old.", "entities": ["left kidney", "lung", "ureter"]},
    ]
    lines.append({"sentence": "Cc.", "entities": []})
    path.write_text("\n\n".join(map(json.dumps, lines)))
    classify = from_spans(str(path))
    assert split_report("B is old. Cc. A is wide.", classify) == {"abdomen": "B is old. Cc.", "pelvis": "A is wide."}
    with pytest.raises(UserError, match=r"lacks 1 sentences, the first: 'Dd\.'"):
        split_report("Cc. Dd.", classify)
    path.write_text(json.dumps({"sentence": "Aa\u2028b.", "region": "pelvis"}, ensure_ascii=False), encoding="utf-8")
    assert from_spans(str(path))(["Aa b."]) == ["pelvis"]
    path.write_bytes(b'{"sentence": "\xe9", "region": ""}')
    with pytest.raises(UserError, match="not UTF-8 at byte 14"):
        from_spans(str(path))
    for bad in ('{"sentence": "A", "region": "head"}', '{"region": "chest"}', "[1]", "{"):
        path.write_text(f'{{"sentence": "A", "region": ""}}\n{bad}\n')
        with pytest.raises(UserError, match="line 2 is not"):
            from_spans(str(path))


def test_reports_split_once_are_read_as_amos_reads_them(tmp_path):
    table = tmp_path / "r.csv"
    rows = ["train_3_a_2.nii.gz,x,Lungs clear. Liver normal.", "train_3_a_1.nii.gz,x,Lungs clear. Liver normal."]
    table.write_text("\n".join(["VolumeName,Impressions_EN,Findings_EN", *rows, "train_4_b_1.nii.gz,x,Bladder empty."]))
    out = str(tmp_path / "ct.json")
    assert write_regions(str(table), out, first=True) == {"chest": 1, "abdomen": 1, "pelvis": 1}
    records, problems = load_records(out, Reading(placeholders=True))
    direct, _ = load_records(f"{table}:regions:first", Reading(placeholders=True))
    assert problems == []
    for found in (records, direct):
        assert [(r.id, r.images, r.region, r.patient, r.turns[1].value) for r in found] == [
            ("train_3_a_1/chest", ("train_3/train_3_a/train_3_a_1.nii.gz",), "chest", "train_3", "Lungs clear."),
            ("train_3_a_1/abdomen", ("train_3/train_3_a/train_3_a_1.nii.gz",), "abdomen", "train_3", "Liver normal."),
            ("train_4_b_1/pelvis", ("train_4/train_4_b/train_4_b_1.nii.gz",), "pelvis", "train_4", "Bladder empty."),
        ]
    table.write_text("VolumeName,Findings_EN\ntrain_1_a_1.nii.gz,\nscan.nii.gz,Clear.\ntrain_2_a_1.nii.gz,Clear, it is.\n")
    with pytest.raises(BadRecords) as caught:
        write_regions(str(table), str(tmp_path / "no.json"))
    assert [problem.where[-8:] for problem in caught.value.problems] == ["record 0", "record 1", "record 2"]
    assert "3 values" in caught.value.problems[2].what
    assert not (tmp_path / "no.json").exists()
    table.write_text("image,caption\na.nii.gz,Clear.\n")
    with pytest.raises(UserError, match="no columns VolumeName and Findings_EN"):
        write_regions(str(table), out)
