"""The contrastive objective: the global batch's loss and gradients on every mesh, in one piece and by way of cached vectors."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from pair_case import ROWS, arrays, case, changed, mesh_of, step

from jaxmed.train.init import blueprint, flatten
from jaxmed.train.optim import make_optimizer

ONE = (1, 1, 1, 1)


pytestmark = pytest.mark.usefixtures("compiled_quickly")


def close(found, wanted) -> None:
    (metrics, grads), (other, other_grads) = found, wanted
    np.testing.assert_allclose(metrics.loss, other.loss, rtol=1e-6)
    np.testing.assert_allclose(metrics.row_loss, other.row_loss, rtol=2e-5, atol=1e-6)
    assert (metrics.count, metrics.right) == (other.count, other.right)
    scale = max(float(np.abs(g).max()) for g in jax.tree.leaves(other_grads))
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=3e-6 * scale), grads, other_grads)


@pytest.fixture(scope="module")
def whole():
    """On one device and in one piece, with dropout."""
    return step(changed(), ONE, arrays())


@pytest.mark.parametrize(
    ("shape", "pieces"),
    [
        (ONE, 4),
        ((2, 2, 1, 2), 4),
        pytest.param((2, 2, 1, 1), 1, marks=pytest.mark.slow),
        pytest.param((8, 1, 1, 1), 2, marks=pytest.mark.slow),
        pytest.param((1, 8, 1, 1), 1, marks=pytest.mark.slow),
    ],
    ids=str,
)
def test_same_loss_and_gradients(whole, shape, pieces):
    close(step(changed(pieces), shape, arrays()), whole)


def test_dropout_depends_on_step_and_pair_alone(whole):
    """Other steps have other bits; pairs in other rows keep theirs."""
    assert abs(step(changed(), ONE, arrays(), seed=4)[0].loss - whole[0].loss) > 1e-3
    order = np.random.default_rng(1).permutation(ROWS)
    moved, grads = step(changed(4), ONE, {name: x[order] for name, x in arrays().items()})
    np.testing.assert_allclose(moved.row_loss, whole[0].row_loss[order], rtol=2e-5, atol=1e-6)
    np.testing.assert_allclose(grads["logit_scale"], whole[1]["logit_scale"], rtol=1e-4)


def test_rows_without_a_pair_take_no_part():
    """Whatever stands in them: they are neither rows nor columns of the logits."""
    absent = (0, 5, 14)
    rest = [row for row in range(ROWS) if row not in absent]
    metrics, grads = step(changed(4), ONE, arrays(absent=absent))
    other = arrays(absent=absent)
    other["images"][list(absent)] = 7.0
    close(step(changed(4), ONE, other), (metrics, grads))
    with jax.set_mesh(mesh_of(ONE)):
        found = case(changed(4), ONE)
        image, text, losses, there = jax.device_get(jax.jit(found.objective.evaluate)(found.params, {}, found.batch(other)))
    np.testing.assert_array_equal(np.flatnonzero(there), rest)
    np.testing.assert_allclose(losses[rest], by_hand(4.37 * image[rest] @ text[rest].T), rtol=1e-5)
    assert metrics.count == 13 and not metrics.row_loss[list(absent)].any()
    nothing, grads = step(changed(4), ONE, arrays(absent=tuple(range(ROWS))))
    assert nothing.loss == 0 and not any(np.any(g) for g in jax.tree.leaves(grads))


def by_hand(logits: np.ndarray) -> np.ndarray:
    """The loss of each pair."""
    logits = logits.astype(np.float64)
    return 0.5 * sum(np.log(np.exp(x).sum(1)) - np.diag(x) for x in (logits, logits.T))


def torch_modes(image: np.ndarray, text: np.ndarray, scale: float, ranks: int) -> dict[str, tuple[float, ...]]:
    """Loss and gradients (by vectors and scale) of upstream's three modes, the mean over ranks; local_loss with labels that
    count from the rank's first row."""

    def cross(logits: torch.Tensor, first: int) -> torch.Tensor:
        return torch.nn.functional.cross_entropy(logits, first + torch.arange(len(logits)))

    found, n = {}, len(image) // ranks
    for mode in ("gathered", "local", "ungathered"):
        i, t, s = (torch.tensor(x, requires_grad=True) for x in (image, text, np.float32(scale)))
        losses = []
        for rank in range(ranks):
            own = slice(rank * n, (rank + 1) * n)
            rows_i, rows_t = (i, t) if mode == "gathered" else (i[own], t[own])
            all_i, all_t = (i[own], t[own]) if mode == "ungathered" else (i, t)
            first = rank * n if mode == "local" else 0
            losses.append((cross(s * rows_i @ all_t.T, first) + cross(s * rows_t @ all_i.T, first)) / 2)
        loss = torch.stack(losses).mean()
        found[mode] = (loss.item(), *(g.numpy() for g in torch.autograd.grad(loss, (i, t, s))))
    return found


@pytest.fixture(scope="module")
def vectors():
    """Of volumes and texts, without dropout, on the host."""
    with jax.set_mesh(mesh_of(ONE)):
        found = case(changed(4), ONE)
        return jax.device_get(jax.jit(found.objective.evaluate)(found.params, {}, found.batch(arrays())))[:2]


@pytest.mark.parametrize(("mode", "group"), [("gathered", 0), ("local", 0), ("ungathered", 4)])
def test_upstreams_three_modes(vectors, mode, group):
    """Over four ranks of four pairs. Local losses with right labels are the global one."""
    shape = (2, 2, 1, 1)
    with jax.set_mesh(mesh_of(shape)):
        found = case(changed(group=group), shape)
        there = found.batch(arrays()).samples > 0
        placed = tuple(jax.device_put(x, found.objective.rules.sharding(mesh_of(shape), "batch", None)) for x in vectors)
        by = jax.jit(jax.value_and_grad(found.objective._loss, argnums=(0, 2), has_aux=True))
        (loss, _), (d_params, d_vectors) = jax.device_get(by(found.params, {}, placed, there))
    wanted = torch_modes(*vectors, 4.37, 4)[mode]
    for ours, theirs in zip((loss, *d_vectors, d_params["logit_scale"]), wanted, strict=True):
        np.testing.assert_allclose(ours, theirs, rtol=1e-4, atol=1e-7)


@pytest.mark.parametrize("exp_scale", [False, True])
def test_temperature_and_accuracy(vectors, exp_scale):
    """The scale multiplies as it is, or by its exponential; accuracy is that of the logits averaged over both directions."""
    image, text = vectors
    with jax.set_mesh(mesh_of(ONE)):
        found = case(changed(exp_scale=exp_scale), ONE)
        there = found.batch(arrays()).samples > 0
        loss, (_, right) = jax.jit(found.objective._loss)(found.params, {}, vectors, there)
    logits = (np.exp(4.37) if exp_scale else 4.37) * (image @ text.T)
    np.testing.assert_allclose(loss, by_hand(logits).mean(), rtol=1e-5)
    np.testing.assert_array_equal(right, (logits + logits.T).argmax(1) == np.arange(ROWS))


def test_weight_decay_is_hugging_faces():
    """Not on biases and the scales of norms; on the temperature, class token, positions and words. Without a gradient, what
    moves is what decays."""
    with jax.set_mesh(mesh_of(ONE)):
        params = jax.tree.map(lambda x: jnp.ones(x.shape), blueprint(changed(), mesh_of(ONE)).trainable)
        optimizer = make_optimizer(changed().optim, 3, params)
        updates, _ = optimizer.update(jax.tree.map(jnp.zeros_like, params), optimizer.init(params), params)
    moved = {path for path, update in flatten(updates).items() if np.any(update)}
    assert flatten(updates).keys() - moved == {path for path in flatten(updates) if path[-1] in ("bias", "scale")}
    assert {path[-1] for path in moved} == {"weight", "logit_scale", "class_token", "positions", "words", "types"}
    np.testing.assert_allclose(updates["logit_scale"], -3e-3 * 0.1, rtol=1e-6)
