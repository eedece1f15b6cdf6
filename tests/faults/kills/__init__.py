"""Runs that are killed at a drawn moment, and the checks that nothing is lost, doubled or half visible."""
