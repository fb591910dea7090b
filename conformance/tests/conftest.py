"""The meta-tests run the kit from its sources."""

import kit_sources  # noqa: F401
