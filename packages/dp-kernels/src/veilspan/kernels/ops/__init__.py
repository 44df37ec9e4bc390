"""One op per file: its kernel, its launcher, its custom operator, its PyTorch formulation."""
