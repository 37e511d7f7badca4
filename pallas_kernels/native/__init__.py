"""What the CPU's kernels share: C++ that is compiled on the machine it runs on, and called through XLA's FFI."""
