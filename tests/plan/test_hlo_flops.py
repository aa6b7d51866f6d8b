"""FLOPs of a compiled module, by hand and from the traced program."""

import jax
import jax.numpy as jnp
import pytest

from jaxmed.plan import hlo, hlo_flops


def compiled(f, *shapes):
    given = [jax.ShapeDtypeStruct(shape, jnp.float32) for shape in shapes]
    return hlo_flops.flops(hlo.parse(jax.jit(f).lower(*given).compile().as_text()))


def test_a_loops_body_counts_as_often_as_it_runs():
    def f(x, y):
        return jax.lax.scan(lambda c, _: (jnp.tanh(c @ y), None), x, length=7)[0]

    assert compiled(f, (40, 24), (24, 24)) == 7 * 2 * 40 * 24 * 24


def test_convolutions_of_patches():
    def f(x, kernel):
        return jax.lax.conv_general_dilated(x, kernel, (4, 4), "VALID", dimension_numbers=("NHWC", "HWIO", "NHWC"))

    assert compiled(f, (2, 16, 24, 3), (4, 4, 3, 10)) == 2 * (2 * 4 * 6 * 10) * (4 * 4 * 3)


LINE = """HloModule m

ENTRY %main (p0: bf16[2,512,64], p1: bf16[48,64,2]) -> bf16[2,512,48] {{
  %p0 = bf16[{left}]{{2,1,0}} parameter(0)
  %p1 = bf16[{right}]{{2,1,0}} parameter(1)
  ROOT %convolution.1 = bf16[{out}]{{2,1,0}} convolution(%p0, %p1), window={{{window}}}, dim_labels={labels}
}}
"""


@pytest.mark.parametrize(
    ("left", "right", "out", "window", "labels", "flops"),
    [
        ("2,512,64", "48,64,1", "2,512,48", "size=1", "0bf_oi0->0bf", 2 * 2 * 512 * 48 * 64),
        ("512,64,1", "2,48,64", "2,48,512", "size=2 pad=1_1 rhs_reversal=1", "bf0_0oi->0fb", 2 * 2 * 512 * 48 * 64),
        ("2,64,512", "2,512,48", "64,48,1", "size=2", "0fb_0io->bf0", 2 * 64 * 48 * 512 * 2),
    ],
)
def test_products_as_tpus_write_them(left, right, out, window, labels, flops):
    text = LINE.format(left=left, right=right, out=out, window=window, labels=labels)
    assert hlo_flops.flops(hlo.parse(text)) == flops
