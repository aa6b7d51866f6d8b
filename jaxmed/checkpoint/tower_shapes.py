"""What the shapes of an image tower's or a text encoder's tensors say where no config does."""

import re

from jaxmed.checkpoint.hf_io import TensorFolder
from jaxmed.errors import UserError

# A tensor that only this kind of tower has, and what stands before it in a folder is the tower's prefix.
LANDMARKS = {
    "patch_embedding.position_embeddings": "vit3d",
    "patch_embed.proj.weight": "dino",
    "embeddings.class_embedding": "clip",
    "embeddings.patch_embedding.bias": "siglip",
}
_HEAD_WIDTH = 64


def kind_of_tensors(tensors: TensorFolder) -> str:
    """ "" where no tower is among them."""
    return next((kind for mark, kind in LANDMARKS.items() if any(_ends(name, mark) for name in tensors.names())), "")


def _ends(name: str, mark: str) -> bool:
    return name == mark or name.endswith(f".{mark}")


class TowerShapes:
    """Shapes of a tower's tensors by the tower's own names, whatever prefix the folder has."""

    def __init__(self, tensors: TensorFolder, landmark: str, where: str):
        found = next((name for name in tensors.names() if _ends(name, landmark)), None)
        if found is None:
            raise UserError(f"{tensors.path}: has no tensor {landmark}, but {where} describes a tower that has one")
        self.tensors, self.prefix = tensors, found.removesuffix(landmark)

    def __contains__(self, name: str) -> bool:
        return self.prefix + name in self.tensors.arrays

    def __call__(self, name: str, rank: int) -> tuple[int, ...]:
        shape = self.tensors.shape(self.prefix + name)
        if len(shape) != rank:
            raise UserError(f"{self.tensors.where(self.prefix + name)}: has shape {list(shape)}, {rank} axes are needed")
        return shape

    def layers(self, stem: str) -> int:
        """Blocks whose tensors start with `stem` and a number."""
        pattern = re.compile(re.escape(self.prefix + stem) + r"(\d+)\.")
        return 1 + max((int(m.group(1)) for name in self.tensors.names() if (m := pattern.match(name))), default=-1)


def head_count(
    width: int, given: int, published: int, where: str, what: str = "image tower", flag: str = "vision.heads"
) -> tuple[int, list[str]]:
    """(heads of `what`, what was assumed): what was given, else heads 64 wide as the published ones have them."""
    if given:
        return given, []
    count = width // _HEAD_WIDTH if width % _HEAD_WIDTH == 0 else published
    if width % count:
        raise UserError(
            f"{where}: no file says how many attention heads the {what} has, and the published {published} do not "
            f"divide its width {width}; give their number with --set {flag}=N"
        )
    return count, ["heads"]
