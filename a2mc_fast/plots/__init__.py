"""Pictures of runs and results, drawn from files: `python -m a2mc_fast.plots PICTURE ...` (extra `plots`).

One module per picture, each with a function that returns a matplotlib `Figure`; `style` holds what they
share, `skeletons` draws poses of any `Skeleton`, `output` writes the file. Nothing is imported here, so that
`--help` is instant.
"""
