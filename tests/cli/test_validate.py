"""What folders decide, what flags may say, what is refused; and the command line of `jaxmed train`."""

import dataclasses
import shutil
from pathlib import Path

import pytest

from jaxmed._configs import btb3d, btb3d_8x8x8
from jaxmed.cli import common, main
from jaxmed.cli.validate import given_flags, resolve
from jaxmed.config import Experiment
from jaxmed.errors import UserError

GOLDEN = Path(__file__).parent.parent / "golden" / "btb3d"
RECORDS = str(GOLDEN / "records_batch.json")


def asked(config: Experiment, **model: str) -> Experiment:
    data = dataclasses.replace(config.data, records=RECORDS, embeddings=str(GOLDEN / "embeddings"))
    return dataclasses.replace(config, model=dataclasses.replace(config.model, **model), data=data)


BASE = str(GOLDEN / "base")
ADAPTERS = {name: str(next((GOLDEN / name).iterdir())) for name in ("llava_lora_z2", "llava_lora_z3", "llava_lora_8x8x8")}


def test_the_base_fills_every_decoder_field() -> None:
    e, notices = resolve(asked(btb3d.get_config(), base=BASE), frozenset())
    d = e.model.decoder
    assert (d.vocab, d.width, d.layers, d.heads, d.kv_heads, d.head_dim, d.mlp) == (432, 54, 4, 9, 3, 6, 143)
    assert (d.norm_eps, d.rope.theta, d.rope.factor, d.rope.original_positions) == (3e-5, 20000.0, 6.0, 192)
    assert any("config.json" in line and "decoder" in line for line in notices)
    assert e.lora == btb3d.get_config().lora


def test_a_decoder_flag_that_disagrees_is_refused() -> None:
    config = asked(btb3d.get_config(), base=BASE)
    with pytest.raises(UserError, match=r"--model.decoder.kv-heads 8 disagrees with .*config.json, which has 3"):
        resolve(config, {"model.decoder.kv_heads"})
    same = dataclasses.replace(config.model.decoder, layers=4)
    resolve(dataclasses.replace(config, model=dataclasses.replace(config.model, decoder=same)), {"model.decoder.layers"})


@pytest.mark.parametrize(
    ("name", "rank", "alpha", "features", "embed"),
    [("llava_lora_z2", 7, 12.0, 18, False), ("llava_lora_z3", 3, 7.0, 18, True), ("llava_lora_8x8x8", 4, 6.0, 72, False)],
)
def test_an_upstream_adapter_decides(name: str, rank: int, alpha: float, features: int, embed: bool) -> None:
    config = btb3d_8x8x8.get_config() if features == 18 else btb3d.get_config()  # the other variant's, on purpose
    e, _ = resolve(asked(config, base=BASE, adapter=ADAPTERS[name]), frozenset())
    assert (e.lora.rank, e.lora.alpha, e.visual.features, e.train.train_embed_tokens) == (rank, alpha, features, embed)
    assert e.visual.merge == ((1, 2, 2) if features == 72 else (1, 1, 1))
    assert e.lora.dropout == config.lora.dropout
    assert e.model.added_tokens == btb3d.ADDED_TOKENS


def test_flags_win_over_an_adapter_where_they_can() -> None:
    config = asked(btb3d.get_config(), base=BASE, adapter=ADAPTERS["llava_lora_z3"])
    lora = dataclasses.replace(config.lora, alpha=9.5, rank=5)
    config = dataclasses.replace(config, lora=lora)
    e, _ = resolve(config, {"lora.alpha", "train.train_embed_tokens"})
    assert (e.lora.alpha, e.lora.rank, e.train.train_embed_tokens) == (9.5, 3, False)
    with pytest.raises(UserError, match=r"--lora.rank 5 disagrees with .*checkpoint-10, which has 3"):
        resolve(config, {"lora.rank"})


@pytest.mark.parametrize(
    ("model", "data", "message"),
    [
        ({}, {}, r"no --model.base: train.trainable adapter needs the folder of a language model"),
        ({"base": "/nowhere"}, {}, r"/nowhere: no such folder"),
        ({"base": BASE}, {"records": ""}, r"no records: give --data.records"),
        ({"base": BASE}, {"records": "/nowhere.json"}, r"--data.records /nowhere.json: no such file"),
        ({"base": BASE}, {"embeddings": "/nowhere"}, r"--data.embeddings /nowhere: no such folder"),
        ({"base": BASE}, {"eval_records": "/nowhere.json"}, r"--data.eval-records /nowhere.json: no such file"),
        ({"base": BASE, "adapter": BASE}, {}, r"is a whole language model; give it as --model.base"),
    ],
    ids=["base", "no-base", "records", "no-records", "no-embeddings", "no-eval", "adapter"],
)
def test_what_is_missing_is_named(model: dict, data: dict, message: str) -> None:
    config = asked(btb3d.get_config(), **model)
    with pytest.raises(UserError, match=message):
        resolve(dataclasses.replace(config, data=dataclasses.replace(config.data, **data)), frozenset())


def test_flags_become_names_of_fields() -> None:
    given = given_flags(["--data.no-shuffle", "--model.decoder.kv-heads", "3", "--lora.alpha=2.5", "-h"])
    assert {"data.shuffle", "model.decoder.kv_heads", "lora.alpha"} <= given


def test_short_forms() -> None:
    flags = ["--on-bad-record", "skip", "--set", "lora.alpha=12", "--set=lora.rank=3", "--out", "x"]
    assert common.long_forms(flags) == [
        "--data.on-bad-record",
        "skip",
        "--lora.alpha=12",
        "--lora.rank=3",
        "--out",
        "x",
    ]


def test_help_is_complete_and_grouped(capsys: pytest.CaptureFixture, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "160")
    with pytest.raises(SystemExit) as stop:
        main.run(["train", "btb3d_align", "--help"])
    text = capsys.readouterr().out
    assert stop.value.code == 0
    for group in ("model options", "visual options", "lora options", "optim options", "train options", "data options"):
        assert group in text
    assert "mesh options" in text and "distributed options" in text
    for flag in ("--out", "--model.base", "--optim.projector-learning-rate", "--data.buckets", "--mesh.context"):
        assert flag in text
    assert "the defaults below are those of btb3d_align" in text.replace("\n", " ")


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (["btb3d"], "no --out"),
        (["nothing", "--out", "x"], "no config 'nothing'"),
        (["--out", "x"], "give a config first"),
        (["btb3d", "--out", "x", "--lora.rank", "-3"], "lora.rank is -3"),
        (["btb3d", "--out", "x", "--lora.rnk", "3"], "lora.rnk"),
    ],
    ids=["out", "config", "first", "value", "flag"],
)
def test_wrong_command_lines_are_one_line(argv: list[str], message: str, capsys: pytest.CaptureFixture) -> None:
    assert main.run(["train", *argv]) == 2
    told = capsys.readouterr().err
    assert message in told and told.startswith("jaxmed train: ") and told.count("\n") == 1


def test_a_run_without_a_checkpoint_is_no_adapter(tmp_path: Path) -> None:
    shutil.copy(GOLDEN / "base" / "config.json", tmp_path / "config.json")
    (tmp_path / "config.json").write_text('{"model": {}, "visual": {}, "train": {}}')
    with pytest.raises(UserError, match="has saved no checkpoint yet"):
        resolve(asked(btb3d.get_config(), base=BASE, adapter=str(tmp_path)), frozenset())
