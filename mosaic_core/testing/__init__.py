"""Contract suites for pytest: what algorithms and adapters must hold to, for any distribution."""

import pytest

# So that a failing assert in a suite shows its values, as in a test of one's own.
pytest.register_assert_rewrite(
    *(f"mosaic_core.testing.{module}" for module in ("adapters", "algorithms", "_workers"))
)

# After the line above.
from mosaic_core.testing._jobs import Job, Session  # noqa: E402
from mosaic_core.testing.adapters import AdapterContract  # noqa: E402
from mosaic_core.testing.algorithms import AlgorithmContract  # noqa: E402

__all__ = ["AdapterContract", "AlgorithmContract", "Job", "Session"]
