"""Upstream's tokenizer files: which they are, what their YAML may say, and which tensors are the encoder's."""

import copy

import numpy as np
import pytest
import torch
import yaml

from jaxmed.checkpoint.volume_encoder_config import check_fits, find_files, read_config
from jaxmed.checkpoint.volume_encoder_tables import encoder_rows, encoder_tensors
from jaxmed.errors import UserError
from jaxmed.models.volume_encoder import PUBLISHED, VolumeEncoderConfig

CONTENT = {
    "model": {
        "quantize_model": {
            "quantizer_type": "lfq",
            "skip_quantize": False,
            "codebook_size": 262144,
            "token_size": 18,
            "use_l2_norm": False,
        },
        "encoder": {
            "filters": 5,
            "num_res_blocks": 3,
            "temporal_downsample": [True, False, True],
            "channel_multipliers": [1, 2, 3, 1],
        },
        "decoder": {
            "filters": 64,
            "num_res_blocks": 2,
            "temporal_downsample": [False],
            "channel_multipliers": [1, 1, 1, 1],
        },
    },
    "modal": "video",
    "architecture": "magvit2",
}


def write(folder, changes=()):
    content = copy.deepcopy(CONTENT)
    for dotted, value in changes:
        *sections, name = dotted.split(".")
        section = content
        for part in sections:
            section = section[part]
        if value is None:
            del section[name]
        else:
            section[name] = value
    path = folder / "model.yaml"
    path.write_text(yaml.safe_dump(content))
    return str(path)


def test_sizes_come_from_both_sections(tmp_path):
    config = read_config(write(tmp_path))
    assert config == VolumeEncoderConfig(64, 3, (1, 2, 3, 1), (True, False, True))
    assert (config.cell, config.name) == ((8, 16, 16), "16x16x8")
    assert read_config("8x8x8") == PUBLISHED["8x8x8"]


@pytest.mark.parametrize(
    ("dotted", "value", "words"),
    [
        ("model.quantize_model.quantizer_type", "vq", "quantizer_type is 'vq'; this encoder needs 'lfq'"),
        ("model.quantize_model.skip_quantize", True, "skip_quantize is True"),
        ("model.quantize_model.codebook_size", 1024, "codebook_size is 1024; this encoder needs 262144"),
        ("model.quantize_model.token_size", 10, "token_size is 10; this encoder needs 18"),
        ("model.quantize_model.use_l2_norm", True, "use_l2_norm is True"),
        ("modal", "image", "modal is 'image'; this encoder needs 'video' or 'nii'"),
        ("architecture", "vqgan", "architecture is 'vqgan'"),
        ("model.encoder.channel_multipliers", [2, 2, 3, 1], "the first must be 1"),
        ("model.encoder.channel_multipliers", [1, 2, 1], "3 encoder.channel_multipliers but 4 decoder.channel_multipliers"),
        ("model.encoder.channel_multipliers", "1, 2", "a list of whole numbers is needed"),
        ("model.encoder.temporal_downsample", [True, True], "2 entries for 4 channel_multipliers"),
        ("model.encoder.temporal_downsample", [1, 0, 1], "a list of true and false is needed"),
        ("model.encoder.temporal_downsample", [True, False, False], "two of its entries must be true"),
        ("model.encoder.num_res_blocks", 0, "at least 1"),
        ("model.decoder.filters", 48, "each must be a multiple of 32"),
        ("model.decoder.filters", "many", "decoder.filters is 'many', a whole number is needed"),
        ("model.decoder", None, "has no section model.decoder"),
    ],
)
def test_what_the_config_may_not_say(tmp_path, dotted, value, words):
    path = write(tmp_path, [(dotted, value)])
    with pytest.raises(UserError, match=words) as caught:
        read_config(path)
    assert str(caught.value).startswith(path) and "\n" not in str(caught.value)


def test_files_that_are_no_config(tmp_path):
    path = tmp_path / "x.yaml"
    for text, words in (
        ("a: [1", "cannot be read as YAML"),
        ("- 1\n", "has no section model"),
        ("!!python/object/apply:os.getcwd []", "cannot be read as YAML"),
    ):
        path.write_text(text)
        with pytest.raises(UserError, match=words) as caught:
            read_config(str(path))
        assert "\n" not in str(caught.value)


def test_which_files(tmp_path):
    with pytest.raises(UserError, match="no such file or folder"):
        find_files(str(tmp_path / "nowhere"), "")
    with pytest.raises(UserError, match=r"no checkpoint \(\*\.ckpt\) in it; give the file itself"):
        find_files(str(tmp_path), "")
    checkpoint = tmp_path / "3rd_stage.ckpt"
    checkpoint.write_bytes(b"")
    with pytest.raises(UserError, match=r"no config .* pass --encoder-config .* or 16x16x8 or 8x8x8"):
        find_files(str(checkpoint), "")
    assert find_files(str(tmp_path), "16x16x8") == (str(checkpoint), "16x16x8")
    path = write(tmp_path)
    assert find_files(str(tmp_path), "") == find_files(str(checkpoint), "") == (str(checkpoint), path)
    (tmp_path / "train.yml").write_text("")
    (tmp_path / "2nd_stage.ckpt").write_bytes(b"")
    with pytest.raises(UserError, match=r"2 files could be the config \(model\.yaml, train\.yml\)"):
        find_files(str(checkpoint), "")
    with pytest.raises(UserError, match=r"2 files could be the checkpoint \(2nd_stage\.ckpt, 3rd_stage\.ckpt\)"):
        find_files(str(tmp_path), "")
    with pytest.raises(UserError, match="no such file; --encoder-config"):
        find_files(str(checkpoint), str(tmp_path / "none.yaml"))


FIRST, LAST = "encoder.conv_first.conv.weight", "encoder.conv_last.conv.bias"


def test_encoder_below_a_prefix(tmp_path):
    path = str(tmp_path / "x.ckpt")
    tokenizer = {FIRST: torch.ones(32, 8, 3, 3, 3), LAST: torch.arange(18.0), "decoder.x": torch.ones(2)}
    state = {f"tokenizer.{name}": value for name, value in tokenizer.items()}
    torch.save({"state_dict": state | {"discriminator.y": torch.ones(2)}, "step": 7}, path)
    tensors = encoder_tensors(path)
    assert set(tensors.source.arrays) == {FIRST, LAST}
    np.testing.assert_array_equal(tensors.source.read(LAST), np.arange(18.0))
    reasons = {name.split(".")[-2]: reason for name, reason in tensors.ignored.items()}
    assert "turns codes back" in reasons["decoder"] and "beside" in reasons["discriminator"]
    with pytest.raises(UserError, match=r"32 filters and 0 downsampling steps, model\.yaml says 96 and 2; pass the config"):
        check_fits(PUBLISHED["8x8x8"], tensors, "model.yaml")
    torch.save({"a": tokenizer, "ema": dict(tokenizer)}, path)
    with pytest.raises(UserError, match=r"holds 2 encoders .*, ema"):
        encoder_tensors(path)
    torch.save({"weight": torch.ones(2)}, path)
    with pytest.raises(UserError, match=f"has no tensor {FIRST}; give the checkpoint of one BTB3D tokenizer"):
        encoder_tensors(path)


def test_rows_have_the_literal_zero():
    names = {row.theirs: row.ours for row in encoder_rows(PUBLISHED["16x16x8"])}
    assert len(names) == len(set(names.values())) == 134
    stem = "encoder.res_blocks.res_block_2"
    assert names[f"{stem}.res_block_0_1.conv_0.conv.weight"] == ("stages", "2", "1", "conv_0", "weight")
    assert names[f"{stem}.res_block_2_0.norm_1.norm_fn.weight"] == ("stages", "2", "0", "norm_1", "scale")
    assert "encoder.res_blocks.res_block_1.res_block_1_0.conv_shortcut.conv.weight" in names
    assert f"{stem}.res_block_2_0.conv_shortcut.conv.weight" not in names
