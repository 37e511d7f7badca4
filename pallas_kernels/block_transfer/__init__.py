"""Gathers blocks of the pool into one array and scatters them back, in place: the payload of a swap."""
