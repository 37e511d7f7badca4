"""Copies blocks of the pool onto others, in place: copy-on-write."""
