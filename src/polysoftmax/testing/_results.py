"""What was measured, and what failed."""

from __future__ import annotations

from dataclasses import dataclass, field


@dataclass(frozen=True)
class Failure:
    """What went wrong, and the smallest program found that shows it."""

    message: str
    code: str

    def __str__(self) -> str:
        return f"{self.message}\n\n{self.code}" if self.code else f"{self.message}\n"


@dataclass
class Result:
    """What was measured of one function in one dtype, on one library in one engine.

    ``rows_alone`` says whether rows had the same bits alone as in a batch, None where that is not promised;
    ``apart`` is the largest distance from the answers of the first library in ulp, None for the first.
    """

    function: str
    dtype: str
    library: str
    engine: str
    cases: int = 0
    failed: int = 0
    left_out: int = 0
    ulps: float = 0.0
    of_bound: float = 0.0
    worst_case: str = ""
    rows_alone: bool | None = None
    apart: float | None = None
    seconds: float = 0.0
    failures: list[Failure] = field(default_factory=list)


@dataclass
class Report:
    """All results. It is true if nothing failed, and its string lists what did."""

    results: list[Result] = field(default_factory=list)

    @property
    def failures(self) -> list[Failure]:
        """Everything that failed."""
        return [failure for one in self.results for failure in one.failures]

    def __bool__(self) -> bool:
        return bool(self.results) and not self.failures

    def __str__(self) -> str:
        cases, failed, left_out = (
            sum(getattr(one, name) for one in self.results) for name in ("cases", "failed", "left_out")
        )
        rest = f"; {left_out} need options that it does not take" if left_out else ""
        said = f"{failed} of {cases} cases fail" if failed else f"All {cases} cases are right"
        return "\n".join([*map(str, self.failures), f"{said}{rest}."])

    def raise_failures(self) -> None:
        """Raise ``AssertionError`` with all failures if there are any."""
        if not self:
            raise AssertionError(str(self))
