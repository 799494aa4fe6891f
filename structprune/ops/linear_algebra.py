"""Operations on matrices and vectors in the last dimensions, each declared by a form such as ``"NN,Nk->Nk"``.

A form names the last dimensions of each tensor and of each result: those in capitals must stay, those in small letters
may go. All dimensions before them are a batch, which broadcasts: the operation treats each matrix of it alone.

    "NN->NN"         an inverse: the matrices must stay, the batch may be pruned
    "NN,Nk->Nk"      solving A X = B: a column of B may go, and with it that of X
    "=NN,N->N"       solving for one vector: only where both have the same batch
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from typing import Any

from structprune.errors import RuleError
from structprune.ops import zeros
from structprune.ops.along import competing, dims_of
from structprune.ops.arguments import arguments
from structprune.ops.context import Context, Operand, operands_in
from structprune.ops.op import Coupling, Result, register_op
from structprune.ops.relations import Axes, Axis


@dataclass(frozen=True, slots=True)
class Form:
    """The last dimensions of the tensors that go in, and of those that come out, a letter each."""

    terms: tuple[str, ...]
    results: tuple[str, ...]
    equal: bool


@cache
def _read(text: str) -> Form:
    inputs, _, outputs = text.removeprefix("=").partition("->")
    return Form(tuple(inputs.split(",")), tuple(outputs.split(",")), text.startswith("="))


def _parts(shape: Any) -> list[tuple[int, ...] | None]:
    return shape if isinstance(shape, list) else [tuple(shape)]


def _fits(form: Form, shapes: Sequence[tuple[int, ...]], results: Sequence[tuple[int, ...] | None]) -> bool:
    """Whether tensors of these shapes, and results of those, are of this form."""
    if len(form.terms) != len(shapes) or len(form.results) != len(results):
        return False
    sizes: dict[str, int] = {}
    batches: set[tuple[int, ...]] = set()
    for letters, shape in zip(form.terms, shapes, strict=True):
        first = len(shape) - len(letters)
        if first < 0 or any(sizes.setdefault(x, n) != n for x, n in zip(letters, shape[first:], strict=True)):
            return False
        batches.add(shape[:first])
    if form.equal and len(batches) > 1:
        return False
    batch = max((len(each) for each in batches), default=0)
    return all(shape is None or len(shape) == batch + len(x) for x, shape in zip(form.results, results, strict=True))


def _by_form(*forms: str, right: Sequence[str] = ()) -> Coupling:
    """The coupling of an operation that has one of these forms; the first that fits counts.

    Forms in `right` are those of a call with ``left=False``, which square matrices do not tell apart.
    """

    def coupling(c: Context, *args: Any, **named: Any) -> Result:
        """What its form says of the last dimensions; those before are a batch."""
        operands = list(operands_in(args, named))
        results = _parts(c.shape)
        shapes = [operand.shape for operand in operands]
        given = right if right and not arguments(c.node).get("left", True) else forms
        form_read = next((_read(form) for form in given if _fits(_read(form), shapes, results)), None)
        if form_read is None:
            raise RuleError(f"tensors of shapes {', '.join(map(str, shapes))}")
        c.node.meta["form"] = form_read
        axes = [
            _result(c, form_read, operands, letters, shape)
            for letters, shape in zip(form_read.results, results, strict=True)
        ]
        return axes if isinstance(c.shape, list) else axes[0]

    return coupling


def _result(c: Context, form: Form, operands: list[Operand], letters: str, shape: Sequence[int] | None) -> Axes | None:
    reason = f"it is a dimension of the matrices of {c.where()}"
    free: dict[str, Axis] = {}
    batches: list[Operand] = []
    for term, operand in zip(form.terms, operands, strict=True):
        first = len(operand.axes) - len(term)
        batches.append(Operand(operand.node, operand.axes[:first]))
        for letter, axis in zip(term, operand.axes[first:], strict=True):
            if letter.isupper():
                c.pin(axis, reason)
            else:
                free[letter] = c.same(free[letter], axis) if letter in free else axis
    batch = c.broadcast(batches)
    if shape is None:
        return None
    new = c.fresh(shape[len(batch) :], reason)
    return (*batch, *(free.get(letter, axis) for letter, axis in zip(letters, new, strict=True)))


def _linear_in(place: int) -> zeros.ZeroRule:
    """The result is zero where tensor argument `place` is."""

    def rule(z: zeros.ZeroContext) -> zeros.Zeros:
        form = z.node.meta["form"]
        source = z.tensors[place]
        zero, letters, results = z.of(source), form.terms[place], form.results[0]
        batch, first = len(z.axes) - len(results), len(zero) - len(letters)
        off = [d + first >= batch and z.whole(source, d - len(z.axes)) for d in range(batch)]
        before = [good and zero[first - batch + d] for d, good in enumerate(off)]
        return (*before, *(x in letters and x.islower() and zero[first + letters.index(x)] for x in results))

    return rule


register_op(
    *["cholesky", "cholesky_inverse", "inverse", "linalg_cholesky", "linalg_inv", "linalg_matrix_exp", "matrix_exp"],
    *["linalg_matrix_power", "matrix_power"],
)(_by_form("NN->NN"))
register_op("det", "logdet", "linalg_det", "linalg_cond", "linalg_matrix_rank")(_by_form("MN->"))
register_op("slogdet", "linalg_slogdet")(_by_form("NN->,"))
register_op("_linalg_det", "linalg_ldl_factor_ex", "linalg_lu_factor_ex", "_lu_with_info")(_by_form("MN->MN,K,"))
register_op("linalg_cholesky_ex", "linalg_inv_ex")(_by_form("NN->NN,"))
register_op("linalg_eigvals", "linalg_eigvalsh", "linalg_svdvals")(_by_form("MN->K"))
register_op("linalg_eig", "linalg_eigh")(_by_form("NN->N,NN"))
register_op("linalg_svd", "svd")(_by_form("MN->MP,K,QN"))
register_op("linalg_qr", "qr")(_by_form("MN->MK,KN"))
register_op("linalg_lu")(_by_form("MN->MP,MK,KN"))
register_op("linalg_lu_factor", "linalg_ldl_factor", "geqrf")(_by_form("MN->MN,K"))
register_op("lu_unpack")(_by_form("MN,K->MP,ML,UN"))
register_op("linalg_pinv", "pinverse")(_by_form("MN->NM"))
register_op("linalg_householder_product", "orgqr")(_by_form("MN,K->MN"))
register_op("ormqr", zeros=_linear_in(2))(_by_form("MN,K,Pk->Pk", right=["MN,K,kP->kP"]))
register_op("linalg_solve", zeros=_linear_in(1))(_by_form("=NN,N->N", "NN,Nk->Nk", right=["NN,kN->kN"]))
register_op("linalg_solve_ex", zeros=_linear_in(1))(_by_form("=NN,N->N,", "NN,Nk->Nk,", right=["NN,kN->kN,"]))
register_op("linalg_lu_solve", zeros=_linear_in(2))(_by_form("NN,N,Nk->Nk", right=["NN,N,kN->kN"]))
register_op("linalg_ldl_solve", zeros=_linear_in(2))(_by_form("NN,N,Nk->Nk"))
register_op("cholesky_solve", zeros=_linear_in(0))(_by_form("Nk,NN->Nk"))
register_op("lu_solve", zeros=_linear_in(0))(_by_form("Nk,NN,N->Nk"))
register_op("triangular_solve", zeros=_linear_in(0))(_by_form("Nk,NN->Nk,NN"))
register_op("linalg_solve_triangular", zeros=_linear_in(1))(_by_form("NN,Nk->Nk", right=["NN,kN->kN"]))


@register_op("linalg_vander")
def vandermonde(c: Context, x: Operand, N: Any = None, **_: Any) -> Axes:  # noqa: N803
    """Powers of each entry, as many as it is told: by default one for each entry."""
    if N is None:
        c.pin(x.axes[-1], f"the number of its channels is used by {c.where()}")
    return (*x.axes, *c.fresh(c.shape[-1:], f"it counts the powers of {c.where()}"))


@register_op("linalg_lstsq")
def least_squares(c: Context, a: Operand, b: Operand, *_: Any, **__: Any) -> Result:
    """Solves for each column of `b` alone; residuals, rank and singular values may be left out (of size 0)."""
    reason = f"it is a dimension of the matrices of {c.where()}"
    vector = len(b.axes) == 1 or (len(b.axes) == len(a.axes) - 1 and b.shape == a.shape[:-1])
    batch, columns = (b.axes[:-1], ()) if vector else (b.axes[:-2], b.axes[-1:])
    for axis in (*a.axes[-2:], b.axes[-1 if vector else -2]):
        c.pin(axis, reason)
    batch = c.broadcast([Operand(a.node, a.axes[:-2]), Operand(b.node, batch)])
    behind = (columns, columns, (), ())
    return [
        None if part is None else _solution(c, part, batch, last, reason)
        for part, last in zip(c.shape, behind, strict=True)
    ]


def _solution(c: Context, shape: Sequence[int], batch: Axes, last: Axes, reason: str) -> Axes:
    """A batch of results, whose last dimensions are those of `last`; pinned if it is empty."""
    if 0 in shape:
        return c.fresh(shape, reason)
    return (*batch, *c.fresh(shape[len(batch) : len(shape) - len(last)], reason), *last)


@register_op("linalg_tensorsolve", "linalg_tensorinv")
def tensors_as_matrices(c: Context, *args: Any, **named: Any) -> Result:
    """All dimensions together are one matrix."""
    return c.pin_all(list(operands_in(args, named)), f"it is a dimension of the matrix of {c.where()}")


def _of_either(z: zeros.ZeroContext) -> zeros.Zeros:
    """A product is zero where one of its factors is."""
    return tuple(
        any(z.whole(tensor, back) and z.of(tensor)[back] for tensor in z.tensors) for back in range(-len(z.axes), 0)
    )


@register_op("cross", "linalg_cross", zeros=_of_either)
def cross(c: Context, a: Operand, b: Operand, *_: Any, **__: Any) -> Result:
    """A product of vectors of three entries, in one dimension: by default in the first that has three."""
    axes = c.broadcast([a, b])
    dims = dims_of(c.node, len(axes))
    if arguments(c.node).get("dim") is None:
        first = next(at for at, axis in enumerate(axes) if axis.size == 3)
        for axis in axes[:first]:
            c.pin(axis, f"with three channels it would be taken for the coordinates in {c.where()}")
        dims = (first,)
    return competing(c, Operand(c.node, axes), dims, f"it is a coordinate in {c.where()}")


def _observed(z: zeros.ZeroContext) -> zeros.Zeros:
    """What never changes has no covariance with anything."""
    source = z.tensors[0]
    zero = z.of(source)
    off = len(zero) == 2 and zero[0] and z.node.meta["name"] == "cov"
    return (off,) * len(z.axes)


@register_op("cov", "corrcoef", zeros=_observed)
def covariance(c: Context, x: Operand, *_: Any, **named: Any) -> Axes:
    """An axis for each variable, a column for each observation."""
    for axis in (*x.axes[-1:], *(axis for operand in operands_in(named) for axis in operand.axes)):
        c.pin(axis, f"its entries are observations in {c.where()}")
    return (x.axes[0], x.axes[0]) if len(x.axes) == 2 else ()


def _spectrum(window: bool) -> Coupling:
    return _by_form("L->FT", "L->FTC", *(["L,W->FT", "L,W->FTC"] if window else []))


register_op("stft", zeros=_linear_in(0))(_spectrum(window=True))
register_op("istft", zeros=_linear_in(0))(_by_form("FT->L", "FT,W->L"))
