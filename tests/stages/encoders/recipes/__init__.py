"""Tests of encoder recipes."""
