"""Pictures of runs and results, drawn from files: one module per picture. Nothing is imported here."""
