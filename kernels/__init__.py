"""The fused operations of A²MC. Installed as `a2mc_fast.kernels`; `reference` holds their plain-torch forms."""
