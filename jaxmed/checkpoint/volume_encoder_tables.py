"""BTB3D's tokenizer checkpoint as our volume encoder: one row per tensor.

Trap in their names: in stage i the first block is `res_block_{i}_0`, all later ones `res_block_0_{j}` with a literal 0.
The decoder (which turns codes back into volumes) and the quantizer's bit masks are in the same file and are left out.
"""

from dataclasses import dataclass

from jaxmed.checkpoint.hf_io import TensorFolder, open_folder
from jaxmed.checkpoint.row import Row
from jaxmed.errors import UserError
from jaxmed.models.volume_encoder import VolumeEncoderConfig

_ANCHOR = "encoder.conv_first.conv.weight"
IGNORED = {
    "decoder.": "the decoder, which turns codes back into volumes",
    "quantize.": "the quantizer's bit masks, which are computed",
    "discriminator": "the discriminator of the tokenizer's training",
    "perceptual_model.": "the perceptual loss of the tokenizer's training",
}
BESIDE = "tensors beside the tokenizer's module"


@dataclass(frozen=True)
class EncoderTensors:
    """The encoder's tensors of a checkpoint, under upstream's names from `encoder.` on."""

    source: TensorFolder
    ignored: dict[str, str]
    """The others, with the reason"""


def encoder_rows(config: VolumeEncoderConfig) -> list[Row]:
    """Every tensor of the encoder."""
    rows = _conv("conv_first", ("conv_first",), bias=True) + _conv("conv_last", ("conv_last",), bias=True)
    rows += _norm("final_norm", ("final_norm",))
    before = config.widths[0]
    for i, width in enumerate(config.widths):
        for j in range(config.blocks):
            theirs = f"res_blocks.res_block_{i}.res_block_{0 if j else i}_{j}"
            rows += _block(theirs, ("stages", str(i), str(j)), widens=j == 0 and width != before)
        before = width
    for i in range(len(config.strides)):
        rows += _conv(f"conv_downsample_blocks.conv_downsample_{i}", ("downsample", str(i)), bias=True)
    for j in range(config.blocks):
        rows += _block(f"res_blocks.res_block_final.res_block_final_{j}", ("final", str(j)), widens=False)
    return rows


def _block(theirs: str, ours: tuple[str, ...], widens: bool) -> list[Row]:
    rows = []
    for part in ("0", "1"):
        rows += _norm(f"{theirs}.norm_{part}", (*ours, f"norm_{part}"))
        rows += _conv(f"{theirs}.conv_{part}", (*ours, f"conv_{part}"), bias=False)
    return rows + (_conv(f"{theirs}.conv_shortcut", (*ours, "shortcut"), bias=False) if widens else [])


def _conv(theirs: str, ours: tuple[str, ...], bias: bool) -> list[Row]:
    return [Row(f"encoder.{theirs}.conv.{part}", (*ours, part)) for part in (("weight", "bias") if bias else ("weight",))]


def _norm(theirs: str, ours: tuple[str, ...]) -> list[Row]:
    parts = {"weight": "scale", "bias": "bias"}
    return [Row(f"encoder.{theirs}.norm_fn.{part}", (*ours, name)) for part, name in parts.items()]


def encoder_tensors(path: str) -> EncoderTensors:
    """Opens a checkpoint file. Its state dict may stand below a prefix (`state_dict.`, `tokenizer.`), as trainers save it."""
    folder = open_folder(path)
    anchors = [name for name in folder.names() if name == _ANCHOR or name.endswith(f".{_ANCHOR}")]
    if len(anchors) != 1:
        what = f"holds {len(anchors)} encoders ({', '.join(anchors)})" if anchors else f"has no tensor {_ANCHOR}"
        raise UserError(f"{path}: {what}; give the checkpoint of one BTB3D tokenizer, such as 3rd_stage.ckpt")
    prefix = anchors[0].removesuffix(_ANCHOR)
    kept, ignored = {}, {}
    for name in folder.names():
        short = name.removeprefix(prefix)
        if name.startswith(prefix) and short.startswith("encoder."):
            kept[short] = name
        else:
            reasons = (reason for start, reason in IGNORED.items() if name.startswith(prefix) and short.startswith(start))
            ignored[name] = next(reasons, BESIDE)
    arrays = {short: folder.arrays[name] for short, name in kept.items()}
    files = {short: folder.files[name] for short, name in kept.items()}
    return EncoderTensors(TensorFolder(folder.path, arrays, files), ignored)
