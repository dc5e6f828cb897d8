"""Models as the pool knows them: found on disk, in parts, with their tokenizer."""
