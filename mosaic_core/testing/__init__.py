"""Contract suites for pytest: what algorithms and adapters must hold to, for any distribution."""

import pytest

# So that a failing assert in a suite shows its values, as in a test of one's own.
pytest.register_assert_rewrite("mosaic_core.testing.algorithms", "mosaic_core.testing.adapters")

# After the line above.
from mosaic_core.testing.adapters import AdapterContract, Job, Session  # noqa: E402
from mosaic_core.testing.algorithms import AlgorithmContract  # noqa: E402

__all__ = ["AdapterContract", "AlgorithmContract", "Job", "Session"]
