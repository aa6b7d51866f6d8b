"""Kernels in programs for devices that are not there: what remat keeps of them, and that they lower and compile."""

import importlib.util
import os
import re
import subprocess
import sys

import jax
import jax.numpy as jnp
import pytest
from flax import nnx
from jax._src.cudnn import fused_attention_stablehlo

from jaxmed.config import DecoderConfig, LoraConfig, MeshConfig, RopeConfig
from jaxmed.model_config import TowerConfig
from jaxmed.models.decoder import Decoder
from jaxmed.models.vit import Vit
from jaxmed.nn import attention as module
from jaxmed.nn.attention import Layout
from jaxmed.sharding import Rules, make_mesh, state_specs, to_shardings

DECODER = DecoderConfig(
    vocab=256,
    width=256,
    layers=3,
    heads=4,
    kv_heads=2,
    head_dim=64,
    mlp=256,
    norm_eps=1e-5,
    rope=RopeConfig(theta=700.0),
    max_positions=1024,
)
LENGTH = 1024


@pytest.fixture
def platform(monkeypatch):
    """Makes the mesh of fake devices pass for another platform's."""

    def pretend(name):
        monkeypatch.setattr(module, "mesh_platform", lambda: name)
        monkeypatch.setattr(fused_attention_stablehlo, "check_cudnn_version", lambda: 91100)

    return pretend


def traced_gradient(remat, shape=(2, 1, 1, 2), order="natural", padding="either"):
    """The gradient of a decoder's output with respect to its input."""
    mesh, rules = make_mesh(MeshConfig(*shape), jax.devices()[: shape[0] * shape[1] * shape[2] * shape[3]]), Rules()
    with jax.set_mesh(mesh):
        abstract = jax.eval_shape(lambda: Decoder(DECODER, LoraConfig(rank=0), 0, jax.random.key(0), False))
        graphdef, state = nnx.split(abstract)
        params = jax.tree.map(
            lambda x, s: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=s),
            nnx.to_pure_dict(state),
            to_shardings(state_specs(state, rules), mesh),
        )

        def total(h, params, positions, segments):
            layout = Layout(order, 512, "auto", packed=False, padding=padding)
            y = nnx.merge(graphdef, params)(h, positions, segments, layout, rules, remat, None)
            return jnp.sum(y.astype(jnp.float32))

        h = jax.ShapeDtypeStruct((2, LENGTH, 256), jnp.bfloat16, sharding=rules.sharding(mesh, "batch", "length", None))
        row = jax.ShapeDtypeStruct((2, LENGTH), jnp.int32, sharding=rules.sharding(mesh, "batch", "length"))
        return jax.jit(jax.grad(total)).trace(h, params, row, row)


def names_in(jaxpr):
    """Names of all primitives, kernels with their own."""
    for equation in jaxpr.eqns:
        if not equation.outvars:
            continue  # a recomputation of which nothing is needed: the compiler drops it
        name = equation.primitive.name
        yield f"{name} {equation.params['name']}" if name == "pallas_call" else name
        for inner in jax.tree.leaves(
            list(equation.params.values()), is_leaf=lambda x: hasattr(x, "eqns") or hasattr(x, "jaxpr")
        ):
            inner = getattr(inner, "jaxpr", inner)
            if hasattr(inner, "eqns") and name != "pallas_call":
                yield from names_in(inner)


@pytest.mark.parametrize(("remat", "forwards"), [("attention", 1), ("full", 2)])
@pytest.mark.parametrize("name", ["gpu", "tpu"])
def test_remat_keeps_what_the_kernel_gave(platform, name, remat, forwards):
    """The attention forward stands once in the program, or a second time where all is recomputed."""
    platform(name)
    found = list(names_in(traced_gradient(remat).jaxpr.jaxpr))
    if name == "gpu":
        assert found.count("dot_product_attention_fwd_wrapper") == forwards
        assert found.count("dot_product_attention_bwd_wrapper") == 1
    else:
        kernels = [n for n in found if n.startswith("pallas_call")]
        assert sum("fwd" in n for n in kernels) == forwards
        assert sum("dkv" in n for n in kernels) == sum("dq" in n for n in kernels) == 1


def test_gradients_of_keys_go_back_to_their_shards_without_an_index():
    """Balanced over context: whole pieces are moved, forward and backward. An index along T would scatter, row by row."""
    found = list(names_in(traced_gradient("full", (1, 1, 4, 2), "balanced").jaxpr.jaxpr))
    assert found.count("reduce_scatter") == 2
    assert not [n for n in found if n.startswith("scatter") or n == "gather"]


def test_cudnn_lowers_for_cuda_with_lengths_and_no_square(platform):
    platform("gpu")
    text = traced_gradient("attention").lower(lowering_platforms=("cuda",)).as_text()
    assert set(re.findall(r"@__cudnn\$(\w+)", text)) == {"fmhaSoftmax", "fmhaSoftmaxBackward"}
    assert "PADDING_CAUSAL" in text
    assert not re.search(rf"tensor<[0-9x]*{LENGTH}x{LENGTH}x", text)


def test_rows_that_end_in_padding_are_not_turned(platform):
    platform("gpu")
    turned, straight = (list(names_in(traced_gradient("full", padding=p).jaxpr.jaxpr)) for p in ("either", "right"))
    assert "gather" in turned and "gather" not in straight


def traced_tower(image=(9, 33, 33)):
    """Gradient of a tower's tokens with respect to its weights, rows split over four devices."""
    config = TowerConfig(
        kind="vit3d", image=image, patch=(3, 3, 3), channels=1, width=192, layers=2, heads=3, mlp=64, select_feature="patch"
    )
    mesh, rules = make_mesh(MeshConfig(2, 2, 1, 2), jax.devices()[:8]), Rules()
    with jax.set_mesh(mesh):
        graphdef, state = nnx.split(jax.eval_shape(lambda: Vit(config, jax.random.key(0))))
        params = jax.tree.map(
            lambda x, s: jax.ShapeDtypeStruct(x.shape, jnp.bfloat16, sharding=s),
            nnx.to_pure_dict(state),
            to_shardings(state_specs(state, rules), mesh),
        )
        x = jax.ShapeDtypeStruct((4, *image, 1), jnp.bfloat16, sharding=rules.sharding(mesh, "batch", *[None] * 4))

        def total(params, x):
            return jnp.sum(nnx.merge(graphdef, params)(x, rules, "full").astype(jnp.float32))

        return jax.jit(jax.grad(total)).trace(params, x)


def test_towers_are_computed_by_the_kernels_too(platform):
    """On GPUs without turning, and without lengths where T is even; on TPUs in whole blocks."""
    platform("gpu")
    for image, mask in (((9, 33, 33), "NO_MASK"), ((6, 33, 33), "PADDING")):  # 364 and, odd, 243 tokens
        on_gpu = traced_tower(image)
        names = list(names_in(on_gpu.jaxpr.jaxpr))
        assert names.count("dot_product_attention_fwd_wrapper") == 2 and "gather" not in names
        text = on_gpu.lower(lowering_platforms=("cuda",)).as_text()
        assert set(re.findall("NO_MASK|PADDING_CAUSAL|PADDING|CAUSAL", text)) == {mask}
    platform("tpu")
    on_tpu = traced_tower()
    kernels = [n for n in names_in(on_tpu.jaxpr.jaxpr) if n.startswith("pallas_call")]
    assert sum("fwd" in n for n in kernels) == 2
    assert on_tpu.lower(lowering_platforms=("tpu",)).as_text().count("@tpu_custom_call") >= 3


@pytest.mark.parametrize("shape", [(2, 1, 1, 2), (1, 1, 4, 2)])
def test_splash_lowers_for_tpus_without_a_square(platform, shape):
    platform("tpu")
    order = "balanced" if shape[2] > 1 else "natural"
    text = traced_gradient("attention", shape, order).lower(lowering_platforms=("tpu",)).as_text()
    assert text.count("@tpu_custom_call") >= 3
    assert not re.search(rf"tensor<[0-9x]*{LENGTH}x{LENGTH}x", text)


PROGRAM = """
import jax, jax.numpy as jnp
from jax.experimental import topologies
from jaxmed.config import MeshConfig
from jaxmed.nn.attention import Layout, Mask, attention
from jaxmed.sharding import Rules, make_mesh

devices = topologies.get_topology_desc(platform="tpu", topology_name="v5p:2x2x1").devices
mesh, rules = make_mesh(MeshConfig(1, 1, 2, 2), devices), Rules()

def total(q, k, v, positions, segments):
    y = attention(q, k, v, positions, segments, Mask(True, 0), Layout("balanced", 512), rules)
    return jnp.sum(y.astype(jnp.float32))

def of(shape, dtype, *axes):
    return jax.ShapeDtypeStruct(shape, dtype, sharding=rules.sharding(mesh, *axes))

with jax.set_mesh(mesh):
    q = of((1, 8192, 8, 128), jnp.bfloat16, "batch", "length", "heads", None)
    kv = of((1, 8192, 4, 128), jnp.bfloat16, "batch", "length", "kv_heads", None)
    row = of((1, 8192), jnp.int32, "batch", "length")
    lowered = jax.jit(jax.grad(total, argnums=(0, 1, 2))).lower(q, kv, kv, row, row)
    assert "splash" in lowered.as_text(debug_info=True)
    print("temporaries", lowered.compile().memory_analysis().temp_size_in_bytes)
"""


@pytest.mark.slow
@pytest.mark.skipif(importlib.util.find_spec("libtpu") is None, reason="needs libtpu")
def test_splash_compiles_for_a_tpu_slice_with_context_and_tensor():
    environment = os.environ | {"JAX_PLATFORMS": "cpu", "TPU_SKIP_MDS_QUERY": "1", "JAX_DEFAULT_MATMUL_PRECISION": "default"}
    done = subprocess.run([sys.executable, "-c", PROGRAM], env=environment, capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stderr[-3000:]
    # scores of 8,192 x 8,192 for one head would be 256 MiB
    assert int(re.search(r"temporaries (\d+)", done.stdout)[1]) < 2**27
