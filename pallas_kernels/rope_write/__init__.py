"""From a layer's product to rotated queries, and keys and values in their blocks, for the rows that hold a token."""
