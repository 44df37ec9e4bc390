"""Public test kit: the slow obvious oracle, plus suites that any rule, kernel or strategy runs."""

from veilspan.core.testing.conformance import (
    assert_kernel_conforms,
    assert_rule_matches,
    assert_step_matches_oracle,
)
from veilspan.core.testing.oracle import Oracle, per_sample_gradients

__all__ = [
    "Oracle",
    "assert_kernel_conforms",
    "assert_rule_matches",
    "assert_step_matches_oracle",
    "per_sample_gradients",
]
