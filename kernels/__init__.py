"""The fused operations of A²MC, installed as `a2mc_fast.kernels`; `reference` holds the plain-torch forms."""
