"""Preconditioners that `newton_cg` makes for itself, from products it has anyway or from a few of its own.

Each is an immutable value with five functions of a memory that lives in the optimizer's state; see `Preconditioner`.
Conjugate gradients on M^-1 H need fewer products than on H where M is closer to H than the identity is.
"""

from typing import Any, NamedTuple, Protocol, runtime_checkable

import jax
import jax.numpy as jnp

from secondorder import checks
from secondorder.linalg import compact_bfgs, probes, tree
from secondorder.linalg.steihaug import Matvec

NARROWEST = 0.5  # power of eps: entries of the diagonal below this share of the largest are raised to it (ours)


@runtime_checkable
class Preconditioner(Protocol):
    """What `newton_cg` asks of a preconditioner that it keeps."""

    def empty(self, zero: tree.ArrayTree) -> Any:
        """Return the memory before the first solve; M = I."""
        ...

    def prepare(self, memory: Any, matvec: Matvec, key: jax.Array, when: jax.Array) -> tuple[Any, jax.Array]:
        """Return the memory for the matrix of this solve, and the products that it cost, int32."""
        ...

    def apply(self, memory: Any, v: tree.ArrayTree) -> tree.ArrayTree:
        """Return M^-1 v."""
        ...

    def notes(self, memory: Any) -> Any:
        """Return what `note` begins with."""
        ...

    def note(self, notes: Any, d: tree.ArrayTree, Hd: tree.ArrayTree, useful: jax.Array) -> Any:
        """Return the notes with a direction of conjugate gradients and its product, if d'Hd > 0."""
        ...

    def learn(self, memory: Any, notes: Any, failed: jax.Array) -> Any:
        """Return the memory for the next solve; an empty one if M was seen not to be positive definite."""
        ...


class DiagonalMemory(NamedTuple):
    """Running means over probes z; memory 2 copies of the parameters."""

    mean: tree.ArrayTree  # of z * Hz: the diagonal [f/x^2]
    square: tree.ArrayTree  # of (z * Hz)^2
    weight: jax.Array  # sum of the squared weights of the means: one over the probes that count


class DiagonalPreconditioner(NamedTuple):
    """Options of `diagonal_preconditioner`."""

    probes: int
    decay: float

    def empty(self, zero: tree.ArrayTree) -> DiagonalMemory:
        """Return a memory without probes."""
        return DiagonalMemory(tree.copy(zero), tree.copy(zero), jnp.zeros((), tree.scalar_dtype(zero)))

    def prepare(
        self, memory: DiagonalMemory, matvec: Matvec, key: jax.Array, when: jax.Array
    ) -> tuple[DiagonalMemory, jax.Array]:
        """Return the means with new probes: `probes` at first, one later (Bekas, Kokiopoulou & Saad 2007)."""
        first = memory.weight == 0
        count = jnp.where(when, jnp.where(first, self.probes, 1), 0).astype(jnp.int32)

        def add(i: jax.Array, memory: DiagonalMemory) -> DiagonalMemory:
            z = probes.signs(jax.random.fold_in(key, i), memory.mean)
            sample = jax.tree.map(jnp.multiply, z, matvec(z))
            finite = jnp.isfinite(tree.max_norm(sample))
            fair = memory.weight / (1.0 + memory.weight)  # by inverse variances
            share = jnp.where(first, jnp.where(i == 0, 1.0, fair), jnp.maximum(fair, 1.0 - self.decay))
            share = share.astype(memory.weight.dtype)
            mean = jax.tree.map(lambda m, s: m + share * (s - m), memory.mean, sample)
            square = jax.tree.map(lambda q, s: q + share * (s * s - q), memory.square, sample)
            weight = (1 - share) ** 2 * memory.weight + share**2
            return tree.where(finite, DiagonalMemory(mean, square, weight), memory)

        return jax.lax.fori_loop(0, count, add, memory), count

    def apply(self, memory: DiagonalMemory, v: tree.ArrayTree) -> tree.ArrayTree:
        """Return v over sqrt(mean^2 + its variance), entry by entry; v itself before the first probe."""
        # The spread of few probes tells how far an entry near zero may be off: it is raised by its own error.
        size = lambda m, q: jnp.sqrt(m * m + memory.weight * jnp.maximum(q - m * m, 0.0))
        sizes = jax.tree.map(size, memory.mean, memory.square)
        largest = tree.max_norm(sizes)
        floor = jnp.finfo(largest.dtype).eps ** NARROWEST * largest
        known = (largest > 0) & jnp.isfinite(largest)
        return jax.tree.map(
            lambda u, d: jnp.where(known, u / jnp.where(known, jnp.maximum(d, floor), 1.0), u), v, sizes
        )

    def notes(self, memory: DiagonalMemory) -> tuple[()]:
        """Return no notes."""
        del memory
        return ()

    def note(self, notes: Any, d: tree.ArrayTree, Hd: tree.ArrayTree, useful: jax.Array) -> Any:
        """Return the notes as they are."""
        del d, Hd, useful
        return notes

    def learn(self, memory: DiagonalMemory, notes: Any, failed: jax.Array) -> DiagonalMemory:
        """Return the memory as it is; M is positive definite whatever the probes were."""
        del notes, failed
        return memory


class LBFGSPreconditioner(NamedTuple):
    """Options of `lbfgs_preconditioner`."""

    memory_size: int

    def empty(self, zero: tree.ArrayTree) -> compact_bfgs.Memory:
        """Return a memory without pairs."""
        return compact_bfgs.empty(zero, self.memory_size)

    def prepare(
        self, memory: compact_bfgs.Memory, matvec: Matvec, key: jax.Array, when: jax.Array
    ) -> tuple[compact_bfgs.Memory, jax.Array]:
        """Return the memory as it is: the last solve has filled it."""
        del matvec, key, when
        return memory, jnp.int32(0)

    def apply(self, memory: compact_bfgs.Memory, v: tree.ArrayTree) -> tree.ArrayTree:
        """Return the L-BFGS inverse Hessian times v."""
        return tree.split_like(compact_bfgs.applied(memory, tree.join_like(v, memory.rows)), v)

    def notes(self, memory: compact_bfgs.Memory) -> tuple[tree.ArrayTree, jax.Array]:
        """Return rows and number of the pairs so far."""
        return memory.rows, memory.pairs

    def note(self, notes: Any, d: tree.ArrayTree, Hd: tree.ArrayTree, useful: jax.Array) -> Any:
        """Return the notes with the pair in place of the oldest."""
        rows, pairs = notes
        s, y = (tree.join_like(v, rows) for v in (d, Hd))
        return compact_bfgs.write(rows, pairs, s, y, useful, self.memory_size)

    def learn(self, memory: compact_bfgs.Memory, notes: Any, failed: jax.Array) -> compact_bfgs.Memory:
        """Return the memory of the pairs that were noted."""
        return compact_bfgs.forget(compact_bfgs.measured(memory, *notes), failed)


def diagonal_preconditioner(probes: int = 10, decay: float = 0.9) -> DiagonalPreconditioner:
    """Precondition by the diagonal of the curvature, estimated with random signs (Hutchinson 1990).

    M_ii = sqrt(d_i² + e_i²), d the mean of z * Hz over random signs z and e its standard error; from one accepted point
    to the next the means take one more probe and forget old ones. It helps where the parameters are badly scaled. On
    curvature with many large entries off the diagonal it can cost more products than it saves.

    Args:
      probes: Products spent on the first estimate, >= 1. Default 10.
      decay: Share of the means that stays at the next point, in (0, 1), no unit. Default 0.9.

    Returns:
      An immutable value to pass as `newton_cg(preconditioner=...)`. Cost: one product per accepted point, counted in
      `info.hessian_products`, no reduction but a maximum. Memory: 2 copies of the parameters.

    Raises:
      ValueError, TypeError: if an option is out of its range.

    Example:
      >>> import jax.numpy as jnp, secondorder as so
      >>> scale = jnp.logspace(0, 2, 8)
      >>> optimizer = so.newton_cg(preconditioner=so.diagonal_preconditioner())
      >>> result = so.minimize(lambda x: jnp.sum(jnp.cosh(scale * (x - 1)) - 1), jnp.full(8, 0.99), optimizer)
      >>> result.params.round(3).tolist()
      [1.0, 1.0, 1.0, 1.0, 1.0, 1.0, 1.0, 1.0]

    References: Bekas, Kokiopoulou & Saad (2007), "An estimator for the diagonal of a matrix", Appl. Numer. Math. 57.
    """
    who = "diagonal_preconditioner"
    checks.integer(who, "probes", probes, 1, hint="10 is usual.")
    checks.number(who, "decay", decay, 0.0, 1.0, hint="0.9 is usual.")
    return DiagonalPreconditioner(probes, decay)


def lbfgs_preconditioner(memory_size: int = 20) -> LBFGSPreconditioner:
    """Precondition by the L-BFGS matrix of the last directions of conjugate gradients (Morales & Nocedal 2000).

    Each product of a solve gives a pair (d, H d); the last m of them, of this solve and the ones before, make the
    preconditioner of the next one. It costs no product.

    Args:
      memory_size: m, pairs kept, >= 1. Default 20.

    Returns:
      An immutable value to pass as `newton_cg(preconditioner=...)`. Cost: two passes over 2m copies of the
      parameters and one more reduction per product. Memory: 2m copies, and as many more within an update.

    Raises:
      ValueError, TypeError: if the option is out of its range.

    Differs from the source: (1) the newest pairs are kept, where the source samples one solve evenly; (2) a trust
    region in the norm of M in place of a line search, with a radius that is rescaled with M.

    Example:
      >>> import jax.numpy as jnp, secondorder as so
      >>> optimizer = so.newton_cg(preconditioner=so.lbfgs_preconditioner(5))
      >>> bool(so.minimize(lambda x: jnp.sum(jnp.cosh(x) * jnp.arange(1.0, 9.0)), jnp.ones(8), optimizer).success)
      True

    References: Morales & Nocedal (2000), "Automatic preconditioning by limited memory quasi-Newton updating", SIAM J.
    Optim. 10.
    """
    checks.integer("lbfgs_preconditioner", "memory_size", memory_size, 1, hint="20 is usual.")
    return LBFGSPreconditioner(memory_size)
