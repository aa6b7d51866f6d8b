"""The tokenizer wrapper against transformers, recorded strings of the original system, and tiktoken's Llama 3."""

import json
import random
import shutil
from pathlib import Path

import pytest
import tokenizers
import vocabularies
from hypothesis import given, settings
from hypothesis import strategies as st

from jaxmed.data.tokenizer import Tokenizer, clean_up, read_end_ids
from jaxmed.errors import UserError

GOLDEN = Path(__file__).parents[1] / "golden" / "btb3d"
BASE, ADAPTER = str(GOLDEN / "base"), str(GOLDEN / "llava_lora_z2" / "checkpoint-16")
ADDED = ("<pad>", "<multiple_choice>", "<long_answer>", "<short_answe>", "<report_generation>")
TEXTS = [
    "",
    " ",
    "Findings: Nodule, 9 mm.\n\nImpression: isn't clear.",
    "<|eot_id|>\n\n\nA<|begin_of_text|>",
    "é😀 \x13",
    "<short_answer><short_answe> <|eot_id",
]


def test_tokens_are_added_in_order_and_kept_where_they_are():
    grown, shipped = Tokenizer.from_folder(BASE, ADDED, pad_token="<pad>"), Tokenizer.from_folder(ADAPTER, ADDED)
    assert [grown.token_id(token) for token in ADDED] == [432, 433, 434, 435, 436]
    for tokenizer in (grown, shipped):
        assert (tokenizer.base_size, tokenizer.size) == (432, 437)
        assert (tokenizer.bos_id, tokenizer.eos_ids, tokenizer.pad_id) == (421, (422, 429, 430), 432)
    assert grown.fingerprint == shipped.fingerprint
    for text in TEXTS:
        assert grown.encode(text) == shipped.encode(text)
    plain = Tokenizer.from_folder(BASE)
    assert (plain.base_size, plain.size, plain.pad_id) == (432, 432, 422)
    assert plain.fingerprint != grown.fingerprint
    assert plain.token_id("<pad>") is None


def test_added_tokens_in_another_order_get_other_ids():
    tokenizer = Tokenizer.from_folder(BASE, ("<b>", "<|eot_id|>", "<a>"))
    assert [tokenizer.token_id(token) for token in ("<b>", "<|eot_id|>", "<a>")] == [432, 430, 433]
    assert (tokenizer.base_size, tokenizer.size) == (432, 434)
    with pytest.raises(UserError, match="'<a>' is empty or stands there twice"):
        Tokenizer.from_folder(BASE, ("<a>", "<b>", "<a>"))


@pytest.mark.parametrize("folder", [BASE, ADAPTER])
def test_encode_and_decode_are_those_of_transformers(folder):
    from transformers import PreTrainedTokenizerFast

    theirs, ours = PreTrainedTokenizerFast.from_pretrained(folder), Tokenizer.from_folder(folder)
    for text in TEXTS:
        ids = theirs(text).input_ids
        assert ours.encode(text) == ids
        assert ours.encode(text, special=False) == theirs(text, add_special_tokens=False).input_ids
        assert ours.decode(ids) == clean_up(theirs.decode(ids, clean_up_tokenization_spaces=False))
        without = theirs.decode(ids, skip_special_tokens=True, clean_up_tokenization_spaces=False)
        assert ours.decode(ids, keep_special=False) == clean_up(without)


def test_decoded_strings_of_the_original_system():
    tokenizer, golden = Tokenizer.from_folder(ADAPTER), json.loads((GOLDEN / "golden" / "decode.json").read_text())
    for name, ids in golden["ids"].items():
        assert tokenizer.decode(ids).strip() == golden["text"][name], name
    for name in ("zero2", "zero2_stripped_history", "zero3", "m72"):
        for entry in json.loads((GOLDEN / "golden" / f"generate_{name}.json").read_text()):
            assert tokenizer.decode(entry["token_ids"]).strip() == entry["answer"]


def test_clean_up_is_literal():
    text = "Yes , it 's , I 'm , we 've , they 're . do n't isn 't ' x ' ? ! <|eot_id|> ."
    assert clean_up(text) == "Yes, it's, I'm, we've, they're. don't isn 't'x '?! <|eot_id|>."
    assert clean_up("x ' n't ' s") == "x'n't's"


def test_clean_up_is_that_of_transformers():
    from transformers import PreTrainedTokenizerFast

    theirs = PreTrainedTokenizerFast.from_pretrained(ADAPTER)
    draw = random.Random(5)
    for _ in range(300):
        text = "".join(draw.choices([" ", "'", "n't", "m", "s", "ve", "re", ".", ",", "?", "!", "x"], k=14))
        assert clean_up(text) == theirs.clean_up_tokenization(text)


def test_clean_up_follows_the_folder(tmp_path):
    raw = tokenizers.Tokenizer.from_file(BASE + "/tokenizer.json")
    on = Tokenizer.from_folder(vocabularies.save(raw, tmp_path / "on"))
    off = Tokenizer.from_folder(vocabularies.save(raw, tmp_path / "off", clean_up_tokenization_spaces=False))
    ids = on.encode("9 mm .", special=False)
    assert (on.decode(ids), off.decode(ids)) == ("9 mm.", "9 mm .")
    assert on.fingerprint != off.fingerprint


PIECES = [
    "<|eot_id|>",
    "<pad>",
    "<pad>lung",
    "</s>",
    "<short_answe>",
    "<short_answe",
    "\n",
    "\n\n",
    " ",
    "  ",
    "lung",
    " lung",
    "'s",
    "9",
    "é😀",
]


@settings(max_examples=150, deadline=None)
@given(st.lists(st.one_of(st.sampled_from(PIECES), st.text(max_size=4)), max_size=9).map("".join))
def test_cutting_at_special_tokens_changes_no_id(text):
    for tokenizer, raw in CUT:
        assert tokenizer.encode(text) == raw.encode(text).ids
        assert tokenizer.encode(text, special=False) == raw.encode(text, add_special_tokens=False).ids


def _cut():
    raws = [tokenizers.Tokenizer.from_file(ADAPTER + "/tokenizer.json"), vocabularies.pieces(True), vocabularies.pieces(False)]
    # One token is the beginning of another, and one swallows the blanks around it.
    longer = tokenizers.Tokenizer.from_file(ADAPTER + "/tokenizer.json")
    longer.add_special_tokens(["<pad>lung", "lung"])
    blanks = tokenizers.Tokenizer.from_file(ADAPTER + "/tokenizer.json")
    blanks.add_special_tokens([tokenizers.AddedToken("9", lstrip=True, rstrip=True, special=True)])
    raws += [longer, blanks]
    return [(Tokenizer(tokenizers.Tokenizer.from_str(raw.to_str())), raw) for raw in raws]


CUT = _cut()


def test_a_saved_folder_reads_back_the_same(tmp_path):
    from transformers import AutoTokenizer

    folder = str(tmp_path / "saved")
    Path(folder).mkdir()
    (Path(folder) / "generation_config.json").write_text('{"temperature": 0.6, "eos_token_id": 3}')
    original = Tokenizer.from_folder(BASE, ADDED, pad_token="<pad>")
    original.save(folder)
    copy, theirs = Tokenizer.from_folder(folder, ADDED), AutoTokenizer.from_pretrained(folder)
    for name in ("size", "base_size", "bos_id", "eos_ids", "pad_id", "prefix", "suffix", "legacy", "fingerprint"):
        assert getattr(copy, name) == getattr(original, name), name
    for text in TEXTS:
        assert copy.encode(text) == original.encode(text) == theirs(text).input_ids
    assert (theirs.bos_token_id, theirs.eos_token_id, theirs.pad_token_id) == (421, 430, 432)
    assert json.loads((Path(folder) / "generation_config.json").read_text())["temperature"] == 0.6


def test_end_ids_and_settings_come_from_the_files_that_are_there(tmp_path):
    assert read_end_ids(BASE) == (422, 429, 430)
    shutil.copy(BASE + "/tokenizer.json", tmp_path)
    assert Tokenizer.from_folder(str(tmp_path)).eos_ids == ()
    assert Tokenizer.from_folder(str(tmp_path)).bos_id == 421
    (tmp_path / "special_tokens_map.json").write_text('{"eos_token": {"content": "<|eom_id|>"}}')
    assert Tokenizer.from_folder(str(tmp_path)).eos_ids == (429,)
    (tmp_path / "config.json").write_text('{"eos_token_id": 430}')
    assert Tokenizer.from_folder(str(tmp_path)).eos_ids == (430,)
    (tmp_path / "generation_config.json").write_text('{"eos_token_id": [422, 430]}')
    assert Tokenizer.from_folder(str(tmp_path)).eos_ids == (422, 430)


def test_tokens_that_only_the_config_lists_are_added(tmp_path):
    shutil.copy(BASE + "/tokenizer.json", tmp_path)
    listed = {"433": {"content": "<y>", "special": True}, "432": {"content": "<x>", "special": True}}
    (tmp_path / "tokenizer_config.json").write_text(json.dumps({"added_tokens_decoder": listed}))
    assert Tokenizer.from_folder(str(tmp_path)).encode("<y><x>", special=False) == [433, 432]
    (tmp_path / "tokenizer_config.json").write_text(json.dumps({"added_tokens_decoder": {"500": {"content": "<x>"}}}))
    with pytest.raises(UserError, match="the id 500"):
        Tokenizer.from_folder(str(tmp_path))


def test_truncation_and_padding_of_the_file_do_not_count(tmp_path):
    raw = tokenizers.Tokenizer.from_file(BASE + "/tokenizer.json")
    raw.enable_truncation(4)
    raw.enable_padding(length=20)
    tokenizer = Tokenizer.from_folder(vocabularies.save(raw, tmp_path))
    assert tokenizer.encode("abcdefghij") == Tokenizer.from_folder(BASE).encode("abcdefghij")


def test_unusable_folders(tmp_path):
    with pytest.raises(UserError, match=r"has no tokenizer\.json"):
        Tokenizer.from_folder(str(tmp_path))
    (tmp_path / "tokenizer.json").write_text('{"model": 3}')
    with pytest.raises(UserError, match="is not a tokenizer"):
        Tokenizer.from_folder(str(tmp_path))
    shutil.copy(BASE + "/tokenizer.json", tmp_path)
    (tmp_path / "tokenizer_config.json").write_text("[")
    with pytest.raises(UserError, match=r"tokenizer_config\.json: cannot be read as JSON"):
        Tokenizer.from_folder(str(tmp_path))


def test_pieces_for_display():
    tokenizer = Tokenizer.from_folder(ADAPTER)
    assert [tokenizer.piece(i) for i in (-200, 430, 256, 220, 9999)] == ["<image>", "<|eot_id|>", "\n\n", " ", "<9999>"]
    assert tokenizer.piece(171) == "ï"  # a byte of a longer character: the vocabulary's spelling
    sentencepiece = Tokenizer(vocabularies.pieces(True))
    assert sentencepiece.piece(sentencepiece.token_id("▁lung")) == " lung"


def test_the_real_llama3_vocabulary():
    tiktoken = pytest.importorskip("tiktoken")
    ranks = vocabularies.llama3_ranks()
    specials = {token: len(ranks) + i for i, token in enumerate(vocabularies.LLAMA3_SPECIALS)}
    theirs = tiktoken.Encoding("llama3", pat_str=vocabularies.LLAMA3_SPLIT, mergeable_ranks=ranks, special_tokens=specials)
    ours = Tokenizer(tokenizers.Tokenizer.from_str(vocabularies.llama3().to_str()), {}, (128001, 128008, 128009), ADDED)
    assert (ours.base_size, ours.size, ours.bos_id) == (128256, 128261, 128000)
    text = "Findings: 12345 mm nodül'S;\n\n\n  Peribronchial—thickening 😀.\t\n <|eot_id|>\n\nNo."
    for start in range(len(text)):
        assert ours.encode(text[start:], special=False) == theirs.encode(text[start:], allowed_special="all")
