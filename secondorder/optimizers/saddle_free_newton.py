"""Saddle-free Newton, for non-convex losses: dense, or in a Krylov space for any number of parameters.

Dauphin, Pascanu, Gulcehre, Cho, Ganguli & Bengio (2014), Algorithm 1, with the exact trust region of Nocedal &
Wright (2006), Algorithm 4.1. The loops stand in `region.py` and in `matrix_free.py`.
"""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from secondorder import checks, matrix_free, transform
from secondorder import region as newton_region
from secondorder.curvature import dense
from secondorder.globalization import trust_region
from secondorder.globalization.stopping import Status
from secondorder.globalization.trust_region import Damping, Trial, TrustRegion
from secondorder.linalg import lanczos, tree
from secondorder.matrix_free import MatrixFreeState, Solved, Step

ASYMMETRY = 0.25  # power of eps: a larger share of a product on the wrong side is no rounding (ours)


class Subspace(NamedTuple):
    """The model on the Ritz vectors of a Krylov space of k dimensions; memory k copies of the parameters."""

    rows: tree.ArrayTree  # Q, orthonormal, as a history of k rows
    coordinates: jax.Array  # column i is the i-th Ritz vector in the basis Q, shape (k, k)
    values: jax.Array  # Ritz values, ascending, and the curvature that stands for all others, shape (k + 1,) [f/x^2]
    projected: jax.Array  # Q g, shape (k,)
    rotated: jax.Array  # g along the Ritz vectors, and the length of the rest of it, shape (k + 1,)


class SaddleFreeRegion(NamedTuple):
    """A trust region whose model has |H| in place of H; see `region.Region`."""

    damping: float
    region: TrustRegion

    @property
    def accept_ratio(self) -> float:
        """Accept a trial whose gain ratio, against the true quadratic model, exceeds this."""
        return self.region.accept_ratio

    def start(self, values: jax.Array, g: jax.Array, x_norm: jax.Array, loss: jax.Array) -> Damping:
        """Return the first radius."""
        return self.region.start(values, g, x_norm, loss)

    def step(self, values: jax.Array, g: jax.Array, damping: Damping) -> jax.Array:
        """Return the step in the eigenbasis, shape (n,)."""
        if g.size == 0:
            return g
        # 1. Minimize g'p + p'|H|p / 2 in the ball.
        sizes, radius = _magnitudes(values, self.damping), damping.size
        order = jnp.argsort(sizes)
        p = jnp.zeros_like(g).at[order].set(trust_region.solve(sizes[order], g[order], radius))
        # 2. Leave a saddle on which the gradient vanishes.
        asleep = jnp.linalg.norm(p) <= jnp.finfo(g.dtype).eps ** 0.5 * radius
        escape = jnp.zeros_like(g).at[0].set(jnp.where(g[0] > 0, -radius, radius))
        return jnp.where(asleep & dense.indefinite(values), escape, p)

    def predict(self, values: jax.Array, g: jax.Array, p: jax.Array, damping: Damping) -> jax.Array:
        """Return the decrease that the true quadratic model promises for the step p."""
        return self.region.predict(values, g, p, damping)

    def resize(self, damping: Damping, trial: Trial) -> Damping:
        """Return the radius after a trial."""
        return self.region.resize(damping, trial)

    def exhausted(self, damping: Damping, values: jax.Array, g: jax.Array, x_norm: jax.Array) -> jax.Array:
        """Return whether steps of this size no longer move x."""
        return self.region.exhausted(damping, values, g, x_norm)


@transform.cached
def saddle_free_newton(
    damping: float = 0.0,
    region: TrustRegion = trust_region.trust_region(),  # noqa: B008
    rank: int | None = None,
) -> optax.GradientTransformationExtraArgs:
    """Saddle-free Newton: every eigenvalue counts by its magnitude, so that saddles repel.

    The trial is x + p with p the minimizer of g'p + p'|H|p/2 over ||p|| <= radius, where |H| has the eigenvectors of
    H and the eigenvalues max(|lambda|, sqrt(eps) max|lambda|, damping). Where the gradient vanishes on a saddle (the
    step would be shorter than sqrt(eps) radius although an eigenvalue is negative), the trial is the step of length
    `radius` along the most negative curvature, downhill if the gradient says which way that is.

    Args:
      damping: Least curvature that a step divides by, >= 0, in the unit of the Hessian [f/x²]. Default 0.
      region: `trust_region(...)`, the options of the radius. Default: `trust_region()`.
      rank: k, 1 <= k <= n: work with the Ritz values and vectors of k Lanczos steps from the gradient, in place of the
        eigenvalues and -vectors of a dense Hessian. What of the gradient lies outside of them counts with their
        smallest magnitude, or `damping` if that is larger. Where the gradient is zero, or passes the test of
        `minimize`, the steps start from a random vector. Default: none, dense.

    Returns:
      A `GradientTransformationExtraArgs`; `update` needs `value`, and `hvp_fn(params, vector)` or `value_fn`.
      Cost: one dense Hessian (n products) and one O(n³) eigendecomposition per accepted point, O(n²) per rejection.
      With a rank: k products that share one linearization and O(n k²) flops per accepted point, O(n k) per rejection;
      memory k + 2 copies of the parameters in the state.

    Raises:
      ValueError, TypeError: here, for options out of range; in `init`, for a rank larger than n; in `update`, if an
        argument is missing.
      Never for NaN: the trial is rejected, and a non-finite Hessian counts as zero. `Status.NOT_SYMMETRIC` if Lanczos
      sees that `hvp_fn` is not symmetric.

    Differs from the source: (1) the step is the exact solution in the ball, where the source divides by |H| and
    searches a damping; (2) the gain ratio compares with the true quadratic model; (3) the rule for zero gradients.

    Example:
      >>> import jax.numpy as jnp, secondorder as so
      >>> def saddle(x):
      ...     return x[0] ** 2 - x[1] ** 2 + x[1] ** 4
      >>> result = so.minimize(saddle, jnp.zeros(2), so.saddle_free_newton())
      >>> round(float(result.value), 3)
      -0.25

    References: Dauphin et al. (2014), "Identifying and attacking the saddle point problem in high-dimensional
    non-convex optimization", NeurIPS, Algorithm 1; Conn, Gould & Toint (2000), section 7.3.
    """
    who = "saddle_free_newton"
    checks.number(who, "damping", damping, strict=False)
    if not isinstance(region, TrustRegion):
        raise TypeError(f"{who}: region must be made by secondorder.trust_region(...), got {region!r}.")
    saddle_free = SaddleFreeRegion(damping, region)
    if rank is None:
        return newton_region.optimizer(who, saddle_free)
    checks.integer(who, "rank", rank, 1, hint="20 to 50 are usual; leave it out for a dense Hessian.")

    def empty(params: tree.ArrayTree) -> Subspace:
        dtype = tree.scalar_dtype(params)
        _check_rank(who, rank, tree.size(params))
        rows = tree.zero_rows(matrix_free.wide(tree.zeros_like(params), dtype), rank)
        k, more = jnp.zeros(rank, dtype), jnp.zeros(rank + 1, dtype)
        return Subspace(rows, jnp.zeros((rank, rank), dtype), more, k, jnp.zeros(rank + 1, dtype))

    def solve(hvp: transform.Hvp | None, state: MatrixFreeState, when: jax.Array) -> Solved:
        del when
        assert hvp is not None
        g = matrix_free.wide(state.grad, state.loss.dtype)
        start, _ = matrix_free.unless_flat(g, state)
        model, skew = _krylov(who, hvp, state.params, g, start, rank, damping)
        x_norm = tree.norm(state.params)
        first = saddle_free.start(model.values, model.rotated, x_norm, state.loss).size
        radius = jnp.where(jnp.isinf(state.damping.size), first, state.damping.size)
        fault = jnp.where(skew, Status.NOT_SYMMETRIC, Status.RUNNING).astype(jnp.int32)
        ritz_values = model.values[:rank]
        return Solved(model, radius, jnp.int32(rank), ritz_values[0], dense.indefinite(ritz_values), fault)

    def answer(model: Subspace, radius: jax.Array) -> Step:
        y = saddle_free.step(model.values, model.rotated, Damping(radius, jnp.ones_like(radius)))
        return Step(y, trust_region.decrease(model.values, model.rotated, y), jnp.linalg.norm(y))

    return matrix_free.optimizer(who, region, matrix_free.Engine(empty, solve, answer, _combine))


@transform.cached
def scale_by_saddle_free_newton(damping: float = 0.0, rank: int | None = None) -> optax.GradientTransformationExtraArgs:
    """Precondition a gradient by |H|^-1, for use in `optax.chain`.

    Args:
      damping: Least curvature that a step divides by, >= 0, in the unit of the Hessian [f/x²]. Default 0.
      rank: As in `saddle_free_newton`. Default: none, dense.

    Returns:
      A `GradientTransformationExtraArgs` that maps g to |H|⁻¹ g (not negated), with the eigenvalues of |H| floored as
      in `saddle_free_newton`; `update` needs `params`, and `hvp_fn` or `value_fn`.
      Cost: one dense Hessian and one eigendecomposition per call, or `rank` products.

    Raises:
      ValueError, TypeError: for a bad option, or if an argument is missing. Never for NaN: the update is then zero.

    Example:
      >>> import optax, secondorder as so
      >>> optimizer = optax.chain(so.scale_by_saddle_free_newton(), optax.scale_by_learning_rate(1.0))

    References: as for `saddle_free_newton`.
    """
    who = "scale_by_saddle_free_newton"
    checks.number(who, "damping", damping, strict=False)
    if rank is not None:
        checks.integer(who, "rank", rank, 1, hint="20 to 50 are usual; leave it out for a dense Hessian.")

    def init(params: tree.ArrayTree) -> optax.EmptyState:
        checks.params(who, params)
        if rank is not None:
            _check_rank(who, rank, tree.size(params))
        return optax.EmptyState()

    def update(
        updates: tree.ArrayTree,
        state: optax.EmptyState,
        params: tree.ArrayTree | None = None,
        *,
        value_fn: Any = None,
        hvp_fn: transform.Hvp | None = None,
        **extra_args: Any,
    ) -> tuple[tree.ArrayTree, optax.EmptyState]:
        hvp = transform.curvature(who, updates, params, value_fn, hvp_fn, extra_args)
        if rank is not None:
            params = transform.as_arrays(params)
            g = matrix_free.wide(updates, tree.scalar_dtype(params))
            model, _ = _krylov(who, hvp, params, g, g, rank, damping)
            floored = _magnitudes(model.values, damping)
            y = jnp.where(floored > 0, model.rotated / jnp.where(floored > 0, floored, 1.0), 0.0)
            y = jnp.where(jnp.all(jnp.isfinite(y)), y, 0.0)
            return tree.cast_like(_combine(model, g, y), updates), state
        values, Q = dense.spectrum(dense.from_products(hvp, params))
        floored = _magnitudes(values, damping)
        rotated = tree.matmul(Q.T, tree.ravel(updates, values.dtype))
        step = tree.matmul(Q, jnp.where(floored > 0, rotated / jnp.where(floored > 0, floored, 1.0), 0.0))
        step = jnp.where(jnp.isfinite(tree.max_norm(step)), step, 0.0)
        return tree.unravel(step, updates), state

    return transform.pair(init, update)


def _check_rank(who: str, rank: int, n: int) -> None:
    if rank > n:
        raise ValueError(
            f"{who}: rank must be at most n, the {n} entries of params, got {rank}; leave it out for dense."
        )


def _krylov(
    who: str,
    hvp: transform.Hvp,
    params: tree.ArrayTree,
    g: tree.ArrayTree,
    start: tree.ArrayTree,
    rank: int,
    damping: tree.Numeric,
) -> tuple[Subspace, jax.Array]:
    """Return the model on the Krylov space of H from `start`, and whether H is seen not to be symmetric."""
    dtype = tree.scalar_dtype(g)
    matvec = matrix_free.linear(who, "hvp_fn", hvp, params, dtype)
    made = lanczos.decompose(matvec, start, rank, jax.random.key(1))
    finite = jnp.all(jnp.isfinite(made.alpha)) & jnp.all(jnp.isfinite(made.beta))
    clean = made._replace(alpha=jnp.where(finite, made.alpha, 0.0), beta=jnp.where(finite, made.beta, 0.0))
    values, coordinates, _ = lanczos.ritz(clean)
    # A Hessian that is not finite counts as zero: what is left is the gradient.
    rows = jax.tree.map(lambda x: jnp.where(jnp.isfinite(x), x, 0.0), made.vectors)
    coordinates = jnp.where(finite, coordinates, jnp.eye(rank, dtype=dtype))
    projected = jnp.where(finite, tree.rows_dot(rows, g, rank), 0.0)
    rotated = tree.matmul(coordinates.T, projected)
    gg = tree.dot(g, g)
    rest = jnp.maximum(gg - jnp.sum(projected**2), 0.0)
    rest = jnp.where(rest > jnp.finfo(dtype).eps ** 0.5 * gg, jnp.sqrt(rest), 0.0)
    outside = jnp.maximum(jnp.min(jnp.abs(values)), damping).astype(dtype)
    model = Subspace(rows, coordinates, jnp.append(values, outside), projected, jnp.append(rotated, rest))
    eps = max([float(jnp.finfo(leaf.dtype).eps) for leaf in jax.tree.leaves(params)], default=0.0)
    return model, finite & (made.skew > eps**ASYMMETRY)


def _combine(model: Subspace, grad: tree.ArrayTree, y: jax.Array) -> tree.ArrayTree:
    """Return the vector with coordinates y, shape (k + 1,): along the Ritz vectors, and along the rest of g."""
    rest = model.rotated[-1]
    t = jnp.where(rest > 0, y[-1] / jnp.where(rest > 0, rest, 1.0), 0.0)
    coefficients = tree.matmul(model.coordinates, y[:-1]) - t * model.projected
    return tree.add_rows(coefficients, model.rows, tree.scale(t, matrix_free.wide(grad, y.dtype)))


def _magnitudes(values: jax.Array, damping: tree.Numeric) -> jax.Array:
    """Return the eigenvalues of |H|, floored; shape (n,)."""
    size = jnp.abs(values)
    floor = jnp.finfo(values.dtype).eps ** 0.5 * jnp.max(size, initial=0.0)
    return jnp.maximum(size, jnp.maximum(floor, damping))
