"""Kernels, and dispatch.py, which picks one.

encoder_ops, pool_project and pair_score are a folder each: reference.py (plain PyTorch), gpu.py (Triton) and, but for
pool_project, C++ for the CPU. packed_linear.py and packed_attention.py call C++ of the compiled library (native.py).
"""
