"""What training reads: tokenizers, datasets of token ids, batches."""
