"""The integer network: its file, its engines, its costs. Nothing here imports TensorFlow.

Read file_format first (what a network consists of), then numpy_engine (what it computes), then numba_engine and kernels
(how the same is computed fast), sliced_engine and sliced_kernels (the same for many images at once).
"""
