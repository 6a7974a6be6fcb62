"""Tests of the server, with a detector that has known answers."""
