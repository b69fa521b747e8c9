"""Callers' files on disk."""
