"""Kernels, one folder each: reference.py (plain PyTorch), cpu.cpp, gpu.py (Triton). dispatch.py picks."""
