"""Classes and tokens that a caller names by their indices."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

from polysoftmax._arrays import cast, default_index, quietly
from polysoftmax._formula import words

if TYPE_CHECKING:
    from polysoftmax._arrays import Array
    from polysoftmax._rows import Rows


def as_index(given: Array, r: Rows, ignore_index: int | None = None) -> Array:
    """Return indices in the library's dtype for them; what is too large for it is out of range, and not ignored."""
    xp, index = r.xp, default_index(r.xp)
    if given.dtype == index:
        return given
    fits = xp.isdtype(given.dtype, "signed integer") or xp.iinfo(given.dtype).bits < xp.iinfo(index).bits
    given = cast(given, index)
    return given if fits else xp.where(given < 0, r.length + (ignore_index == r.length), given)


def has_nan(y: Array) -> bool:
    """Whether there is a NaN in an answer whose values are free to look at."""
    if y.ndim:
        with quietly(y):
            y = words(y).total(y)
    return math.isnan(y.item())


def first_outside(r: Rows, given: Array, known: Array) -> int | None:
    """Return the first of the indices that is not known, None if all are."""
    xp = r.xp
    if bool(xp.all(known)):
        return None
    place = int(xp.argmin(xp.astype(xp.reshape(known, (-1,)), xp.int8)))
    return xp.reshape(given, (-1,))[place].item()  # type: ignore[no-any-return]
