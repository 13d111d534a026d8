"""Turn text and dialogue into datasets of token ids."""
