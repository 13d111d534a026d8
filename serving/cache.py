"""The keys and values of sequences of different length, one a row, for GPT.hidden().

L layers, R rows in use, G heads of keys and values, S columns, D head size
"""

import math

import torch


class RowCache:
    """A KV cache whose rows join and leave independently of each other.

    The tokens of a row start at column 0. The rows in use are always the first ones.
    """

    def __init__(self, config, n_rows, device, dtype):
        self.block_size = config.block_size
        self.lengths = []  # tokens of each row in use
        self.n_tokens = 0  # of the longest row; GPT.hidden() advances it
        shape = config.n_layer, 2, n_rows, config.n_kv_head, min(256, self.block_size), config.head_size
        # zeros: a masked slot must not hold a NaN
        self.kv = torch.zeros(shape, device=device, dtype=dtype)  # (L, 2, rows, G, S, D)

    def reserve(self, n_tokens):
        """Make the rows at least n_tokens wide. Doubling keeps the number of copies small."""
        old, n_columns = self.kv, self.kv.size(4)
        if n_tokens > n_columns:
            n_wider = min(max(n_tokens, 2 * n_columns), self.block_size)
            self.kv = old.new_zeros(*old.shape[:4], n_wider, old.size(5))
            self.kv[..., :n_columns, :] = old

    def add(self, prompts, prompt, n_tokens):
        """Append a row that begins with n_tokens of a row of a KVCache."""
        row = len(self.lengths)
        self.reserve(n_tokens)
        for layer, (keys, values) in zip(self.kv, prompts.kv, strict=True):
            layer[0, row, :, :n_tokens] = keys[prompt, :, :n_tokens]
            layer[1, row, :, :n_tokens] = values[prompt, :, :n_tokens]
        self.lengths.append(n_tokens)
        self.n_tokens = max(self.lengths)

    def remove(self, row):
        """Free a row. The last row takes its number."""
        n_tokens = self.lengths.pop()
        last = len(self.lengths)
        if row < last:
            self.kv[:, :, row, :, :n_tokens] = self.kv[:, :, last, :, :n_tokens]
            self.lengths[row] = n_tokens
        self.n_tokens = max(self.lengths, default=0)

    def clear(self):
        self.lengths, self.n_tokens = [], 0

    def extend(self, x):
        """Make room for one more token in each row, x (R, 1, C). See KVCache.extend()."""
        R, S = len(self.lengths), self.n_tokens + 1
        self.reserve(S)
        positions = torch.tensor(self.lengths, device=x.device)[:, None]  # (R, 1)
        mask = None
        if min(self.lengths) < self.n_tokens:
            is_empty = torch.arange(S, device=x.device) > positions  # (R, S)
            mask = torch.zeros_like(is_empty, dtype=x.dtype).masked_fill(is_empty, -math.inf)
            mask = mask[:, None, None]  # (R, 1, 1, S)
        self.lengths = [n + 1 for n in self.lengths]
        return positions, mask, [(keys[:R, :, :S], values[:R, :, :S], positions) for keys, values in self.kv]
