"""Exports of a store: its samples in the formats that other trainers read."""
