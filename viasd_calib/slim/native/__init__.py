"""Kernels of our own for narrow passes on a CPU: a pass through all sublayers is one call, in 16, 8 or 4 bits."""
