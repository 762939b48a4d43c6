"""Contract suites: what every backend of a family must do, to be run on a plugin's own.

Plain functions that raise AssertionError; they need torch and no test runner. Nothing else in core
imports this.
"""
