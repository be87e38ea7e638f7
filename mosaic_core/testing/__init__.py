"""Contract suites for pytest: what every algorithm must hold to, for use by any distribution."""

import pytest

# So that a failing assert in a suite shows its values, as in a test of one's own.
pytest.register_assert_rewrite("mosaic_core.testing.algorithms")

from mosaic_core.testing.algorithms import AlgorithmContract  # noqa: E402  # after the line above

__all__ = ["AlgorithmContract"]
