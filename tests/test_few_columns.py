"""Factorizations of a few columns, written out, against LAPACK's: hundreds of matrices in one program."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from cases import precision

from secondorder.linalg import few_columns, thin_svd

MATRICES, ROWS = 60, 12
LEVEL = 30 * np.finfo(float).eps


def _matrices(n, rows):
    """Return matrices of every kind that a fit meets: (kind, A), A: (MATRICES, rows, n)."""
    rng = np.random.default_rng(n)
    A = rng.standard_normal((MATRICES, rows, n))
    graded = A * 10.0 ** rng.uniform(-12, 12, (MATRICES, 1, n))
    dependent = np.concatenate([A[:, :, :-1], A[:, :, :1] + 1e-9 * A[:, :, -1:]], axis=2)
    lost = np.where(np.arange(n) == 0, 0.0, A)
    one = np.repeat(A[:, :, :1], n, axis=2)
    kinds = {"random": A, "graded": graded, "huge": 1e200 * A, "tiny": 1e-200 * A, "equal": np.linalg.qr(A)[0]}
    return kinds if n == 1 else kinds | {"dependent": dependent, "zero column": lost, "rank one": one}


@pytest.fixture(scope="module")
def factorizations():
    """Return all factorizations of one shape from one compiled program."""

    def both(A, b):
        R, c = thin_svd.triangle(A, b)
        return R, c, thin_svd.factorize(R, c)

    def run(n, rows):
        with precision("float64"):
            matrices = _matrices(n, rows)
            b = np.random.default_rng(9).standard_normal((MATRICES, rows))
            program = jax.jit(jax.vmap(both))
            return {kind: (A, b, *jax.tree.map(np.asarray, program(A, b))) for kind, A in matrices.items()}

    return run


@pytest.mark.parametrize(("n", "rows"), [(1, ROWS), (2, ROWS), (3, ROWS), (3, 3)])
def test_triangle_and_singular_values_are_exact_to_rounding(factorizations, n, rows):
    assert n <= few_columns.LIMIT
    for kind, (A, b, R, c, svd) in factorizations(n, rows).items():
        peak = np.max(np.abs(A), axis=1, keepdims=True)
        size = peak[:, 0, :] * np.linalg.norm(A / np.where(peak > 0, peak, 1.0), axis=1)
        scaled = lambda M, size=size: M / np.where(size > 0, size, 1.0)[:, None, :]
        gram = lambda M: np.einsum("lki,lkj->lij", M, M)
        assert np.allclose(gram(scaled(R)), gram(scaled(A)), atol=LEVEL, rtol=0), kind  # columns keep angles and norms
        assert np.allclose(np.linalg.norm(c, axis=1), np.linalg.norm(b, axis=1), rtol=LEVEL), kind
        expected = np.linalg.svd(A, compute_uv=False)[:, ::-1]
        largest = expected[:, -1:]
        assert np.all(np.diff(svd.singular, axis=1) >= 0), kind
        assert np.allclose(svd.singular / largest, expected / largest, atol=LEVEL, rtol=0), kind
        found = svd.singular > 0
        assert np.allclose(gram(svd.vectors), np.eye(n) * found[:, None, :], atol=LEVEL, rtol=0), kind
        product = np.einsum("lij,lj->li", svd.vectors, svd.singular / largest * svd.projected)
        assert np.allclose(product, np.einsum("lki,lk->li", A / largest[:, :, None], b), atol=3 * LEVEL, rtol=0), kind


def test_what_is_not_finite_stays_visible():
    A = jnp.ones((5, 2)).at[3, 1].set(jnp.nan)
    for bad in (A, A.at[3, 1].set(jnp.inf), A.at[3, 1].set(-jnp.inf)):
        R, _ = jax.jit(thin_svd.triangle)(bad, jnp.ones(5))
        assert not np.all(np.isfinite(np.asarray(R)))


def test_no_library_is_called():
    text = jax.jit(jax.vmap(thin_svd.triangle)).lower(jnp.ones((7, 5, 2)), jnp.ones((7, 5))).compile().as_text()
    assert "custom-call" not in text  # such as LAPACK's geqrf
