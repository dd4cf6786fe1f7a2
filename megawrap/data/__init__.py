"""Data: JSONL lines in, tokens in indexed datasets between, packed rows out.

Nothing here imports torch; each module names what it owns.
"""
