"""The integer network: its file, its engines, its costs. Nothing here imports TensorFlow.

Read file_format first (what a network consists of), then numpy_engine (what it computes), then numba_engine and
kernels (how the same is computed fast), paired_engine and paired_kernels (fast with AVX2), sliced_engine and
sliced_kernels (for many images at once).
"""
