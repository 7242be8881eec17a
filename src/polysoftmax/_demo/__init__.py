"""``python -m polysoftmax demo``: the library at work on real text, on every backend that is installed."""
