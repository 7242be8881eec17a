"""Benchmarks of polysoftmax against what its users would have called instead; ``python -m benchmarks`` runs them."""
