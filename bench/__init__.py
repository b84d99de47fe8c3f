"""Benchmarks. `pytest bench` runs them; the baselines they compare with are also the tests' oracles."""
