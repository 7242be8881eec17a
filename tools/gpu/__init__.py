"""The stages of a run on a GPU: each module has ``names``, ``start``, ``summarize`` and ``lines``.

``names(asked)`` lists the items of the stage, ``start(asked)`` imports what they need and returns the function that
runs one by its name, ``summarize(records)`` counts what came of them, and ``lines(summary)`` says it in words.
"""
