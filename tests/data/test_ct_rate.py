"""CT-RATE's reports: paths and patients from names, reconstructions, regions, rows that cannot be used, splits by patient."""

import pytest

from jaxmed.config import VisualConfig
from jaxmed.data.captions import CAPTION_PROMPTS
from jaxmed.data.ct_rate import check_patients, flat_path, volume_path
from jaxmed.data.inputs import input_path
from jaxmed.data.records import Reading, load_records
from jaxmed.errors import UserError

PLAIN = Reading(placeholders=True)
HEADER = "VolumeName,ClinicalInformation_EN,Technique_EN,Findings_EN,Impressions_EN"
ROWS = [
    'train_12_b_2.nii.gz,Cough,x,"Lungs are clear.\nThe liver, too, is normal. ",None',
    'train_12_b_1.nii.gz,Cough,x,"Lungs are clear.\nThe liver, too, is normal. ",None',
    "train_7_a_1.nii.gz,,x,It is unchanged.,None",
]


def write(tmp_path, *rows, name="r.csv", header=HEADER):
    path = tmp_path / name
    path.write_text("\n".join([header, *rows]) + "\n")
    return str(path)


def test_a_report_is_the_findings_of_a_volume(tmp_path):
    records, problems = load_records(write(tmp_path, *ROWS), PLAIN)
    assert problems == []
    assert [(r.id, r.images[0], r.patient, r.row) for r in records] == [
        ("train_12_b_2", "train_12/train_12_b/train_12_b_2.nii.gz", "train_12", 0),
        ("train_12_b_1", "train_12/train_12_b/train_12_b_1.nii.gz", "train_12", 1),
        ("train_7_a_1", "train_7/train_7_a/train_7_a_1.nii.gz", "train_7", 2),
    ]
    assert [turn.value for turn in records[0].turns] == [CAPTION_PROMPTS[0], "Lungs are clear. The liver, too, is normal."]
    assert records[0].extra["ClinicalInformation_EN"] == "Cough"
    assert (records[0].prompts, records[0].region) == (CAPTION_PROMPTS[:1], "")


def test_one_reconstruction_of_a_scan_and_a_record_a_region(tmp_path):
    path = write(tmp_path, *ROWS)
    assert [r.id for r in load_records(f"{path}:first", PLAIN)[0]] == ["train_12_b_1", "train_7_a_1"]
    records, _ = load_records(f"{path}:first:regions", PLAIN)
    assert [(r.id, r.region, r.turns[1].value) for r in records] == [
        ("train_12_b_1/chest", "chest", "Lungs are clear."),
        ("train_12_b_1/abdomen", "abdomen", "The liver, too, is normal."),
        ("train_7_a_1/chest", "chest", "It is unchanged."),
    ]
    assert "abdomen" in records[1].turns[0].value
    assert [r.id for r in load_records(f"{path}:abdomen", PLAIN)[0]] == ["train_12_b_2/abdomen", "train_12_b_1/abdomen"]
    with pytest.raises(UserError, match=r"a table has no list 'train'; known words"):
        load_records(f"{path}:train", PLAIN)


BAD = [("train_1_a_2.nii.gz,,,  ,x", "Findings_EN are empty"), ("scan.nii.gz,,,Clear.,x", "'scan.nii.gz', not SPLIT_PATIENT")]


@pytest.mark.parametrize("word", ["", ":regions", ":first"])
@pytest.mark.parametrize(("row", "what"), BAD)
def test_an_unusable_row_is_named_and_the_others_are_read(tmp_path, row, what, word):
    records, problems = load_records(f"{write(tmp_path, row, ROWS[2])}{word}", PLAIN)
    assert [record.row for record in records] == [1]
    assert len(problems) == 1 and what in problems[0].what and "record 0" in problems[0].where


def test_volumes_lie_in_their_folders_or_side_by_side(tmp_path):
    nested = volume_path("valid_3_a_1")
    assert nested == "valid_3/valid_3_a/valid_3_a_1.nii.gz"
    assert flat_path(nested) == "valid_3_a_1.nii.gz"
    assert flat_path(f"/data/{nested}") == "/data/valid_3_a_1.nii.gz"
    for other in ("valid_3_a_1.nii.gz", "valid_4/valid_3_a/valid_3_a_1.nii.gz", f"x{nested}", "ct_case/000006/Axial.npy"):
        assert flat_path(other) == ""
    volumes, tokens = VisualConfig(kind="volumes"), VisualConfig(kind="embeddings")
    folder = str(tmp_path)
    assert input_path(folder, nested, volumes) == f"{folder}/{nested}"
    (tmp_path / "valid_3_a_1.nii.gz").touch()
    (tmp_path / "valid_3_a_1.nii_embedded.npz").touch()
    for name in (nested, f"{folder}/{nested}"):
        assert input_path(folder, name, volumes) == f"{folder}/valid_3_a_1.nii.gz"
    assert input_path(folder, nested, tokens) == f"{folder}/valid_3_a_1.nii_embedded.npz"
    (tmp_path / "valid_3/valid_3_a").mkdir(parents=True)
    (tmp_path / nested).touch()
    assert input_path(folder, nested, volumes) == f"{folder}/{nested}"
    assert input_path(folder, "absent_1_a_1.nii.gz", volumes) == f"{folder}/absent_1_a_1.nii.gz"


def test_a_patient_on_both_sides_is_named():
    check_patients(["train_1", "", "train_2"], ["", "train_3"], ("a.csv", "b.csv"))
    with pytest.raises(UserError, match=r"b\.csv has records of 2 patients of a\.csv: train_9, train_11;.*by patient"):
        check_patients([f"train_{n}" for n in range(12)], ["train_11", "train_9", "train_9", "x"], ("a.csv", "b.csv"))
    with pytest.raises(UserError, match=r"12 patients of a\.csv: train_0, .*train_9 and 2 more"):
        check_patients([f"train_{n}" for n in range(12)], [f"train_{n}" for n in range(12)], ("a.csv", "b.csv"))
