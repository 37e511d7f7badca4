"""The sum of the residual stream and a layer's part, and its normalised form, for the rows that hold a token."""
