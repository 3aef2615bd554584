"""Kernels for CPUs: packed weights, multiplied in compiled code."""
