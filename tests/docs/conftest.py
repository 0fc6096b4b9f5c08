"""The browser of the tests of reports, also for pages of the documentation."""

from tests.tofu.reporting.conftest import browser

__all__ = ["browser"]
