"""Attention of a ragged stream of queries over a paged pool: decode rows and chunks of prompts in one call."""
