"""The Triton kernels, installed as bda_fused.kernels."""
