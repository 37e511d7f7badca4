"""Products of a step's tokens with weights that lie as the CPU's kernel reads them."""
