"""BERTScore against transformers' hidden states and the formula."""

import json

import pytest
import torch
import transformers
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors

from jaxmed.errors import UserError
from jaxmed.evaluate import scores
from jaxmed.evaluate.bertscore import BertScore
from jaxmed.evaluate.studies import Study
from jaxmed.report import evaluation

BERT = "tests/golden/vit3d/bert_tiny"
PAIRS = [
    ("Normal liver.", "the liver is normal in size"),
    ("there is a fracture of the left rib.", "no fracture"),
    ("  lung  ", "lung"),
]


def f1(model, rows, layer):
    """`rows`: ids of both texts."""
    vectors = []
    for ids in rows:
        with torch.no_grad():
            hidden = model(torch.tensor([ids]), output_hidden_states=True).hidden_states[layer][0]
        vectors.append(hidden / hidden.norm(dim=-1, keepdim=True))
    cosines = vectors[0] @ vectors[1].T
    precision, recall = cosines.max(1).values[1:-1].mean(), cosines.max(0).values[1:-1].mean()
    return float(2 * precision * recall / (precision + recall))


@pytest.fixture(scope="module")
def bert():
    return BertScore(BERT, 1)


def test_bert_is_transformers_after_as_many_blocks(bert):
    model = transformers.AutoModel.from_pretrained(BERT).eval()
    tokenizer = transformers.AutoTokenizer.from_pretrained(BERT)
    bert.prepare(text for pair in PAIRS for text in pair)
    for pair in PAIRS:
        ids = [tokenizer(text.strip())["input_ids"] for text in pair]
        assert bert(*pair) == pytest.approx(f1(model, ids, 1), abs=2e-6)
    assert abs(bert(*PAIRS[0]) - f1(model, [tokenizer(text)["input_ids"] for text in PAIRS[0]], 2)) > 1e-3
    assert bert.facts["layer"] == 1 and len(bert.facts["hash"]) == 12
    assert bert("", "lung") == bert("lung", " ") == 0


@pytest.fixture(scope="module")
def roberta(tmp_path_factory):
    """A tiny RoBERTa with random weights and a byte-level tokenizer."""
    folder = tmp_path_factory.mktemp("roberta")
    specials = ["<s>", "<pad>", "</s>", "<unk>"]
    pieces = specials + sorted(pre_tokenizers.ByteLevel.alphabet())
    raw = Tokenizer(models.BPE({piece: i for i, piece in enumerate(pieces)}, []))
    raw.pre_tokenizer, raw.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    raw.post_processor = processors.RobertaProcessing(("</s>", 2), ("<s>", 0), add_prefix_space=False)
    raw.add_special_tokens(specials)
    raw.save(str(folder / "tokenizer.json"))
    names = {"bos_token": "<s>", "eos_token": "</s>", "pad_token": "<pad>", "tokenizer_class": "RobertaTokenizer"}
    (folder / "tokenizer_config.json").write_text(json.dumps(names))
    sizes = {"hidden_size": 24, "num_hidden_layers": 3, "num_attention_heads": 3, "intermediate_size": 40}
    config = transformers.RobertaConfig(
        vocab_size=len(pieces), max_position_embeddings=50, type_vocab_size=1, layer_norm_eps=1e-3, pad_token_id=1, **sizes
    )
    torch.manual_seed(4)
    model = transformers.RobertaModel(config)
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.2)
    model.save_pretrained(folder)
    return folder, raw, model.eval()


def test_roberta_counts_positions_from_its_padding_on(roberta):
    folder, raw, model = roberta
    scorer = BertScore(str(folder), 2)
    for pair in PAIRS[:2]:
        expected = f1(model, [raw.encode(f" {text.strip()}").ids for text in pair], 2)
        assert scorer(*pair) == pytest.approx(expected, abs=3e-6)
    assert len(scorer.ids("x" * 90)) == 48  # cut at its positions less the two before the first


def test_it_joins_the_other_scores_and_their_intervals(bert, tmp_path):
    studies = [Study(str(i), "", ("q",), (a,), (r,)) for i, (a, r) in enumerate(PAIRS)]
    found = scores.score(studies, [("lung",)] * 3, "zeros", 20, scorers=(bert,))
    assert found.corpus["bertscore"] == pytest.approx(sum(bert(*pair) for pair in PAIRS) / 3)
    assert found.intervals["bertscore"][0] < found.corpus["bertscore"] < found.intervals["bertscore"][1]
    assert found.control.drop["bertscore"] != 0 and "meteor_exact" not in found.corpus
    beside = evaluation.Beside(bertscore=bert.facts)
    page = tmp_path / "page.html"
    evaluation.write_page(page, studies, found, "t", [], [], evaluation.PageOptions(), beside=beside)
    assert 'BERTScore<br><span class="soft small">bert_tiny, layer 1</span>' in page.read_text()  # beside the figure


def test_folders_that_cannot_be_used(tmp_path):
    with pytest.raises(UserError, match="no BERT or RoBERTa"):
        BertScore(str(tmp_path))
    with pytest.raises(UserError, match=r"bertscore-layer is 3.*1 to 2"):
        BertScore(BERT, 3)
