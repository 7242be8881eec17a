"""What the report of peers measures: relative errors of rows that are all but certain, and of rows nearly equal."""

from __future__ import annotations

import math
import re

import mpmath
import numpy as np
import pytest

from polysoftmax.testing._confident import Figure, confident, divergence, log_of_winner, slope_of_winner, table


def most(figure: Figure) -> float:
    """The relative error that is allowed; only a derivative of 16-bit logits is rounded to their dtype."""
    if figure.question == "KL":
        return 8 * 2.0**-24 / figure.input
    return 2.0**-8 if (figure.question, figure.dtype) == ("1 - p", "bfloat16") else 4 * 2.0**-24


def test_confident_rows_beside_the_peers() -> None:
    for library in ("torch", "jax", "scipy"):
        pytest.importorskip(library)
    figures = list(confident())
    ours = [one for one in figures if one.by == "polysoftmax"]
    assert len(ours) == 26
    assert not [one for one in ours if one.error > most(one)]
    assert re.search(r"^\| float32 \| log p \| 40 \| [1-9]\.\de-0[89] \| .*\|$", table(figures), re.MULTILINE)


def test_what_confident_rows_are_measured_by() -> None:
    """At a gap of 40 both are e^-40 = 4.248354255291589e-18, to all digits of a double."""
    assert -float(log_of_winner(40.0)) == float(slope_of_winner(40.0)) == 4.248354255291589e-18
    even = np.asarray([0.0, 0.0])  # KL of (1/2, 1/2) and (3/4, 1/4) is log(2/sqrt(3))
    assert float(divergence(even, np.asarray([math.log(3.0), 0.0]))) == pytest.approx(
        float(mpmath.log(2 / mpmath.sqrt(3))), rel=1e-14
    )
