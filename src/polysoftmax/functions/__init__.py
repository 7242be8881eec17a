"""The public functions: what they promise, and the checks before a formula runs."""
