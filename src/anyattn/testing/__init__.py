"""Checks of a backend or of a machine: cases, their arrays, and float64 results with derived error budgets.

A `Case` holds the choices of one call and no arrays. `make_inputs` makes its arrays, `compute` calls the public
functions, and `compare` reports the results outside the budget that `expected` derives. `check` does all of it:

>>> from anyattn import testing
>>> testing.check(testing.Case("causal", causal=True, seqlen_q=30, seqlen_k=50), backend="numpy")
[]

`feature_cases` yields a case for every feature, and `random_case` samples any number of further cases. Only NumPy
arrays are supported; bfloat16 needs ml_dtypes.
"""

from .arrays import make_inputs
from .cases import DTYPES, FEATURES, Case, Limits, feature_cases, random_case
from .checks import DERIVATIVES, PASSES, Results, check, compare, compute, expected, malformed, share
from .inputs import CaseInputs, Span, has_dtype, numpy_dtype
from .problems import describe, to_numpy
from .sampling import expected_results, sample

__all__ = [
    "DERIVATIVES",
    "DTYPES",
    "FEATURES",
    "PASSES",
    "Case",
    "CaseInputs",
    "Limits",
    "Results",
    "Span",
    "check",
    "compare",
    "compute",
    "describe",
    "expected",
    "expected_results",
    "feature_cases",
    "has_dtype",
    "make_inputs",
    "malformed",
    "numpy_dtype",
    "random_case",
    "sample",
    "share",
    "to_numpy",
]
