"""Batches of requests, run in idle capacity."""
