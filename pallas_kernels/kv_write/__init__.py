"""Writes a step's keys and values to their slots of the pool, in place."""
