"""jaxmed's towers filled from torch state dicts through the conversion table, gradients under torch's names, and the two
towers that transformers does not have, in torch, written after the papers' code: DINO's ViT and M3D's ViT3D.
"""

import os
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import torch
from flax import nnx

from jaxmed.checkpoint.hf_io import TensorFolder
from jaxmed.checkpoint.load import read_params
from jaxmed.checkpoint.row import Row
from jaxmed.config import MeshConfig
from jaxmed.sharding import Rules, make_mesh

torch.set_num_threads(1)
RULES = Rules()
GOLDEN = os.path.join(os.path.dirname(__file__), "..", "golden")


def one_device() -> jax.sharding.Mesh:
    return make_mesh(MeshConfig(1), jax.devices()[:1])


def randomise(module: torch.nn.Module, seed: int, spread: float = 0.25) -> torch.nn.Module:
    """Every parameter at random, norms and biases too."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, p in module.named_parameters():
            noise = torch.randn(p.shape, generator=generator)
            norm = p.dim() == 1 and name.endswith("weight")
            p.copy_(1 + 0.3 * noise if norm else spread * noise)
    return module.eval()


def state_of(module: torch.nn.Module, prefix: str, gradients: bool = False) -> dict[str, np.ndarray]:
    """Canonical name -> value (or gradient, where there is one)."""
    named = dict(module.named_parameters())
    if gradients:
        return {prefix + name: p.grad.numpy() for name, p in named.items() if p.grad is not None}
    return {prefix + name: p.detach().numpy() for name, p in named.items()}


def filled(make: Callable[[], nnx.Module], rows: Sequence[Row], tensors: Mapping[str, np.ndarray]) -> tuple[Any, Any]:
    """(graphdef, nested dict of parameters). Tensors that no row names are left out; every parameter is filled."""
    graphdef, state = nnx.split(jax.eval_shape(make))
    shapes = jax.tree.map(lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype), nnx.to_pure_dict(state))
    wanted = {name for row in rows for name in row.names()}
    there = {name: array for name, array in tensors.items() if name in wanted}
    folder = TensorFolder("memory", there, dict.fromkeys(there, "file"))
    return graphdef, read_params(rows, [folder], shapes)


def theirs(rows: Sequence[Row], params: Any) -> dict[str, np.ndarray]:
    """Our arrays under their names."""
    named: dict[str, np.ndarray] = {}
    for row in rows:
        array = params
        for key in row.ours:
            array = array if key == "{layer}" else array[key]
        array = np.asarray(array)
        for name, ours in zip(row.names(), array if row.layers else [array], strict=True):
            named[name] = row.transform.write(ours, named.get(name))
    return named


def at_root(rows: Sequence[Row]) -> list[Row]:
    """Rows of a part, for the part's module alone."""
    return [Row(r.theirs, r.ours[1:], r.layers, r.transform) for r in rows]


def close(got: Any, want: Any, rtol: float, name: str = "") -> None:
    """Largest error over the largest value."""
    got, want = np.asarray(got, np.float64), np.asarray(want, np.float64)
    assert got.shape == want.shape, (name, got.shape, want.shape)
    error = np.abs(got - want).max() / np.abs(want).max()
    assert error < rtol, f"{name}: {error:.2e}"


def channels_last(x: np.ndarray) -> jax.Array:
    return jnp.asarray(np.moveaxis(x, 1, -1))


class Attention(torch.nn.Module):
    """One matrix for q, k and v; `out` is the output projection's name."""

    def __init__(self, width: int, heads: int, bias: bool, out: str):
        super().__init__()
        self.qkv = torch.nn.Linear(width, 3 * width, bias=bias)
        self.add_module(out, torch.nn.Linear(width, width))
        self.heads, self.out = heads, out

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        q, k, v = self.qkv(x).unflatten(-1, (3, self.heads, -1)).permute(2, 0, 3, 1, 4)
        weights = (q @ k.transpose(-1, -2) * q.shape[-1] ** -0.5).softmax(-1)
        return self.get_submodule(self.out)((weights @ v).transpose(1, 2).flatten(2))


class Block(torch.nn.Module):
    def __init__(self, width: int, heads: int, mlp: int, bias: bool, eps: float, names: tuple[str, str, str]):
        super().__init__()
        out, up, down = names
        self.norm1, self.norm2 = torch.nn.LayerNorm(width, eps), torch.nn.LayerNorm(width, eps)
        self.attn = Attention(width, heads, bias, out)
        self.mlp = torch.nn.Module()
        self.mlp.add_module(up, torch.nn.Linear(width, mlp))
        self.mlp.add_module(down, torch.nn.Linear(mlp, width))
        self.up, self.down = self.mlp.get_submodule(up), self.mlp.get_submodule(down)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = x + self.attn(self.norm1(x))
        return x + self.down(torch.nn.functional.gelu(self.up(self.norm2(x))))

    def named_parameters(self, *args: Any, **kwargs: Any):
        """Without the second names of the MLP's layers."""
        return ((n, p) for n, p in super().named_parameters(*args, **kwargs) if not n.startswith(("up.", "down.")))


class Vit3d(torch.nn.Module):
    """M3D's: the patches' matrix over voxels, a class token without position, q, k, v without bias."""

    def __init__(self, image, patch, channels: int, width: int, mlp: int, layers: int, heads: int, eps: float):
        super().__init__()
        self.cls_token = torch.nn.Parameter(torch.zeros(1, 1, width))
        self.patch_embedding = torch.nn.Module()
        count = int(np.prod([i // p for i, p in zip(image, patch, strict=True)]))
        self.patch_embedding.position_embeddings = torch.nn.Parameter(torch.zeros(1, count, width))
        linear = torch.nn.Linear(int(np.prod(patch)) * channels, width)
        self.patch_embedding.patch_embeddings = torch.nn.Sequential(torch.nn.Identity(), linear)
        names = ("out_proj", "linear1", "linear2")
        self.blocks = torch.nn.ModuleList(Block(width, heads, mlp, False, eps, names) for _ in range(layers))
        self.norm = torch.nn.LayerNorm(width, eps)
        self.patch = patch

    def forward(self, x: torch.Tensor) -> tuple[torch.Tensor, list[torch.Tensor]]:
        """x [B, C, D, H, W]"""
        p1, p2, p3 = self.patch
        b, c, d, h, w = x.shape
        x = (
            x.reshape(b, c, d // p1, p1, h // p2, p2, w // p3, p3)
            .permute(0, 2, 4, 6, 3, 5, 7, 1)
            .reshape(b, -1, p1 * p2 * p3 * c)
        )
        x = self.patch_embedding.patch_embeddings(x) + self.patch_embedding.position_embeddings
        x = torch.cat([self.cls_token.expand(b, -1, -1), x], 1)
        outputs = []
        for block in self.blocks:
            x = block(x)
            outputs.append(x)
        return self.norm(x), outputs


class Dino(torch.nn.Module):
    """DINO's ViT; positions are resized as its own code does it."""

    def __init__(self, side: int, patch: int, width: int, mlp: int, layers: int, heads: int, eps: float):
        super().__init__()
        self.cls_token = torch.nn.Parameter(torch.zeros(1, 1, width))
        self.pos_embed = torch.nn.Parameter(torch.zeros(1, 1 + (side // patch) ** 2, width))
        self.patch_embed = torch.nn.Module()
        self.patch_embed.proj = torch.nn.Conv2d(3, width, patch, patch)
        self.blocks = torch.nn.ModuleList(Block(width, heads, mlp, True, eps, ("proj", "fc1", "fc2")) for _ in range(layers))
        self.norm = torch.nn.LayerNorm(width, eps)
        self.size = patch

    def positions(self, height: int, width: int, patches: int) -> torch.Tensor:
        count = self.pos_embed.shape[1] - 1
        if patches == count and height == width:
            return self.pos_embed
        side = round(count**0.5)
        table = self.pos_embed[:, 1:].reshape(1, side, side, -1).permute(0, 3, 1, 2)
        scale = ((height // self.size + 0.1) / side, (width // self.size + 0.1) / side)
        table = torch.nn.functional.interpolate(table, scale_factor=scale, mode="bicubic")
        return torch.cat([self.pos_embed[:, :1], table.flatten(2).transpose(1, 2)], 1)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """x [B, 3, rows, columns] -> all tokens after the norm"""
        height, width = x.shape[2:]
        x = self.patch_embed.proj(x).flatten(2).transpose(1, 2)
        positions = self.positions(height, width, x.shape[1])
        x = torch.cat([self.cls_token.expand(len(x), -1, -1), x], 1) + positions
        for block in self.blocks:
            x = block(x)
        return self.norm(x)


def value_and_gradients(run: Callable[[Any], jax.Array], params: Any, weights: np.ndarray) -> tuple[jax.Array, Any]:
    """`run(params)`, and the gradients of its sum times `weights`."""

    def total(params: Any) -> tuple[jax.Array, jax.Array]:
        out = run(params)
        return jnp.sum(out * weights), out

    gradients, out = jax.jit(jax.grad(total, has_aux=True))(params)
    return out, gradients


def check_gradients(rows: Sequence[Row], gradients: Any, wanted: Mapping[str, np.ndarray], rtol: float) -> None:
    """Each tensor's; those of biases of keys are zero but for rounding, and left out."""
    got = theirs(rows, gradients)
    assert got.keys() <= wanted.keys()
    for name, array in got.items():
        if not name.endswith(("k_proj.bias", "key.bias")):
            close(array, wanted[name], rtol, name)
