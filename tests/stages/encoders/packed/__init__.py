"""Tests of packed models."""
