"""Making and looking at JSONL and vocabularies, before preprocessing."""
