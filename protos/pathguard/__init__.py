"""Pathguard's own contracts, by version."""
