"""Before torch's own test support is imported: it wants ``expecttest``, of which no sample needs anything."""

import importlib.util
import sys
import types
import unittest


def without_expecttest() -> None:
    """Put a stand-in where the package is not installed."""
    if "expecttest" not in sys.modules and importlib.util.find_spec("expecttest") is None:
        stand_in = types.ModuleType("expecttest")
        stand_in.TestCase = unittest.TestCase
        sys.modules["expecttest"] = stand_in


without_expecttest()
