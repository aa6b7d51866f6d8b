"""One row of the conversion table, and how a row speaks of layers."""

from dataclasses import dataclass

from jaxmed.checkpoint.transforms import Identity, Transform

LAYER = "{layer}"


@dataclass(frozen=True)
class Row:
    theirs: str
    """Canonical name; may hold `{layer}`"""
    ours: tuple[str, ...]
    """Our path; may hold `{layer}`. () with `same_as`"""
    layers: int = 0
    """How many layers `{layer}` stands for (0: no such thing in the row)"""
    transform: Transform = Identity()
    same_as: str = ""
    """Fills nothing: if the file has the tensor, it must equal this one (a tied head that was stored all the same)"""
    shared: bool = False
    """Reads a tensor that another row holds in whole, so a tree may lack this path"""

    def names(self) -> list[str]:
        """Their names, one a layer."""
        return [self.theirs.replace(LAYER, str(i)) for i in range(self.layers)] if self.layers else [self.theirs]
