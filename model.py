"""GPT in one file: GPT-2 as OpenAI released it (arch='gpt2') and its modern sibling (arch='modern').

    from model import GPT, GPTConfig
    model = GPT(GPTConfig(vocab_size=65, block_size=64, n_layer=4, n_head=4, n_embd=128))
    logits, loss = model(idx, targets)
    ids = model.generate(idx, max_new_tokens=100, temperature=0.8, top_k=200)

gpt2    learned positions, LayerNorm, GELU, a head tied to the embedding; parameter names are nanoGPT's.
modern  rotary positions, query-key norm, ReLU squared, RMSNorm without weights (also after the embedding), no
        biases, an untied head that starts at zero, logits capped at +-15: the `nanochat` of transformers.

B batch, T tokens in a row, S tokens seen so far, C n_embd, H n_head, D = C / H, V vocab_size, L n_layer.
"""

import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import NamedTuple

import torch
import torch.nn as nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint as recompute

import kernels

RMS_EPS = 1e-6  # transformers' NanoChatConfig.rms_norm_eps
ROPE_THETA = 10_000.0
LOGIT_SOFTCAP = 15.0
ACTIVATIONS = {
    'gelu_tanh': kernels.gelu_tanh,
    'gelu': F.gelu,
    'relu2': lambda x: F.relu(x).square(),  # arXiv:2109.08668 (Primer)
}


@dataclass
class GPTConfig:
    """The architecture of a model, stored beside its weights.

    vocab_size  the default is GPT-2's 50257, padded to a multiple of 64 for the matrix kernels
    bias        of linear and LayerNorm layers; None = True for gpt2, False for modern
    activation  None = gelu_tanh for gpt2, relu2 for modern; nanoGPT uses gelu
    raises      ValueError for shapes that do not fit together
    """

    block_size: int = 1024
    vocab_size: int = 50304
    n_layer: int = 12
    n_head: int = 12
    n_embd: int = 768
    dropout: float = 0.0
    bias: bool | None = None
    arch: str = 'gpt2'
    activation: str | None = None

    def __post_init__(self):
        if self.arch not in ('gpt2', 'modern'):
            raise ValueError(f'arch={self.arch} is unknown: accepted are gpt2, modern')
        for name in ('block_size', 'vocab_size', 'n_layer', 'n_head', 'n_embd'):
            if not 1 <= getattr(self, name) < 2**31:
                raise ValueError(f'{name}={getattr(self, name)}: accepted is 1 or more, below 2**31')
        if not 0.0 <= self.dropout < 1.0:
            raise ValueError(f'dropout={self.dropout}: accepted is 0.0 or more, below 1.0')
        modern = self.arch == 'modern'
        if modern and self.bias:
            raise ValueError('bias=True: arch=modern has no biases, use bias=False or arch=gpt2')
        unit = 2 * self.n_head if modern else self.n_head  # rotary positions need an even head size
        if self.n_embd % unit:
            near = [n for n in (self.n_embd // unit * unit, (self.n_embd // unit + 1) * unit) if n]
            raise ValueError(f'n_embd={self.n_embd} is not divisible by {"2 x " * modern}n_head={self.n_head}'
                             f': use n_embd={" or ".join(map(str, near))}')
        self.bias = not modern if self.bias is None else bool(self.bias)
        self.activation = self.activation or ('relu2' if modern else 'gelu_tanh')
        if self.activation not in ACTIVATIONS:
            accepted = ', '.join(ACTIVATIONS)
            raise ValueError(f'activation={self.activation} is unknown: accepted are {accepted}')


def make_norm(config):
    if config.arch == 'modern':
        return nn.RMSNorm(config.n_embd, eps=RMS_EPS, elementwise_affine=False)
    return nn.LayerNorm(config.n_embd, bias=config.bias)


def rotary_table(config):
    """Return cos and sin of every position for rotate(): (block_size, 1, 1, D) float32 each."""
    D = config.n_embd // config.n_head
    frequency = ROPE_THETA ** (-torch.arange(0, D, 2, dtype=torch.float32) / D)
    angle = torch.outer(torch.arange(config.block_size, dtype=torch.float32), frequency)[:, None, None]
    return torch.cat((angle.cos(), angle.cos()), dim=-1), torch.cat((angle.sin(), -angle.sin()), dim=-1)


def rotate(x, cos, sin):
    """Apply rotary positions in their half-split form (arXiv:2104.09864) to x, (B, T, ..., D)."""
    a, b = x.chunk(2, dim=-1)
    return x * cos + torch.cat((b, a), dim=-1) * sin


class CausalSelfAttention(nn.Module):
    def __init__(self, config):
        super().__init__()
        self.n_head, self.dropout = config.n_head, config.dropout
        self.c_attn = nn.Linear(config.n_embd, 3 * config.n_embd, bias=config.bias)
        self.c_proj = nn.Linear(config.n_embd, config.n_embd, bias=config.bias)
        self.resid_dropout = nn.Dropout(config.dropout)

    def forward(self, x, rotary, mask, slots):
        B, T, C = x.shape
        qkv = self.c_attn(x).view(B, T, 3, self.n_head, C // self.n_head)  # (B, T, 3, H, D)
        if rotary is None:
            q, k, v = qkv.unbind(2)  # (B, T, H, D) each
        else:
            qk = rotate(qkv[:, :, :2], *rotary)  # queries and keys in one call
            q, k = F.rms_norm(qk, qk.shape[-1:], eps=RMS_EPS).unbind(2)  # arXiv:2010.04245
            v = qkv[:, :, 2]
        q, k, v = q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2)  # (B, H, T, D)
        if slots is not None:  # of a layer, from KVCache.slots()
            keys, values, positions = slots
            k, v = keys.index_copy_(2, positions, k), values.index_copy_(2, positions, v)  # (B, H, S, D)
        y = kernels.attention(q, k, v, mask, self.dropout if self.training else 0.0)
        y = y.transpose(1, 2).reshape(B, T, C)
        return self.resid_dropout(self.c_proj(y))


class MLP(nn.Module):
    def __init__(self, config):
        super().__init__()
        self.c_fc = nn.Linear(config.n_embd, 4 * config.n_embd, bias=config.bias)
        self.c_proj = nn.Linear(4 * config.n_embd, config.n_embd, bias=config.bias)
        self.activation = ACTIVATIONS[config.activation]
        self.dropout = nn.Dropout(config.dropout)

    def forward(self, x):
        return self.dropout(self.c_proj(self.activation(self.c_fc(x))))


class Block(nn.Module):
    def __init__(self, config):
        super().__init__()
        self.ln_1 = make_norm(config)
        self.attn = CausalSelfAttention(config)
        self.ln_2 = make_norm(config)
        self.mlp = MLP(config)

    def forward(self, x, rotary, mask, slots):
        x = x + self.attn(self.ln_1(x), rotary, mask, slots)
        return x + self.mlp(self.ln_2(x))


class Scores(NamedTuple):
    nats: torch.Tensor  # (B, T) float32 cross entropy, 0 where there is no target
    is_argmax: torch.Tensor  # (B, T) bool, whether the target has the largest logit


class GPT(nn.Module):
    def __init__(self, config: GPTConfig):
        super().__init__()
        self.config = config
        self.activation_checkpointing = False  # True: recompute blocks in the backward pass
        self.compiled = False  # set by compile_blocks()
        self.bf16_residual = False  # True: sum the outputs of the blocks in bfloat16, if it computes in that
        self.loss_chunks = 'auto'  # chunks of loss() and score(); 'auto' = by size of the logits
        self.cross_entropy = kernels.cross_entropy  # may be compiled by itself
        parts = dict(wte=nn.Embedding(config.vocab_size, config.n_embd))
        if config.arch == 'gpt2':
            parts['wpe'] = nn.Embedding(config.block_size, config.n_embd)
        parts['drop'] = nn.Dropout(config.dropout)
        parts['h'] = nn.ModuleList(Block(config) for _ in range(config.n_layer))
        parts['ln_f'] = make_norm(config)
        self.transformer = nn.ModuleDict(parts)
        self.lm_head = nn.Linear(config.n_embd, config.vocab_size, bias=False)
        self.softcap = LOGIT_SOFTCAP if config.arch == 'modern' else None
        if config.arch == 'gpt2':
            self.transformer.wte.weight = self.lm_head.weight
        else:
            cos, sin = rotary_table(config)
            self.register_buffer('cos', cos, persistent=False)
            self.register_buffer('sin', sin, persistent=False)
        self.init_weights()

    @torch.no_grad()
    def init_weights(self):
        """gpt2: N(0, 0.02), output projections divided by sqrt(2 L) (the GPT-2 paper).
        modern: embedding N(0, 1), matrices of deviation 1/sqrt(C), output projections and head 0 (nanochat).
        """
        modern = self.config.arch == 'modern'
        for name, p in self.named_parameters():
            if name.endswith('bias'):
                nn.init.zeros_(p)
            elif p.dim() < 2:
                nn.init.ones_(p)
            elif not modern:
                is_output = name.endswith('c_proj.weight')
                nn.init.normal_(p, std=0.02 / math.sqrt(2 * self.config.n_layer) if is_output else 0.02)
            elif name == 'lm_head.weight' or name.endswith('c_proj.weight'):
                nn.init.zeros_(p)
            elif name == 'transformer.wte.weight':
                nn.init.normal_(p)
            else:
                bound = math.sqrt(3 / self.config.n_embd)  # for a standard deviation of 1/sqrt(C)
                nn.init.uniform_(p, -bound, bound)

    def hidden(self, idx, cache=None, documents=None):
        """Run the network up to its last norm.

        idx        (B, T) int64
        cache      KVCache of the tokens before idx; the tokens of idx are added to it
        documents  (B, T) int64 document number of each token, for packed rows and for padding: tokens attend
                   within their document only, and positions count from its start
        returns    (B, T, C)
        raises     ValueError if the row, cached tokens included, is longer than block_size
        """
        T = idx.size(1)
        n_seen = 0 if cache is None else cache.n_tokens
        if n_seen + T > self.config.block_size:
            raise ValueError(f'{n_seen + T} tokens do not fit into block_size {self.config.block_size}')
        x, rotary = self.transformer.wte(idx), None  # (B, T, C)
        dtype = kernels.compute_dtype(x)
        if documents is None:
            position, mask = slice(n_seen, n_seen + T), kernels.causal_mask(x, n_seen)
        else:
            if cache is not None:
                documents = cache.documents = torch.cat((cache.documents, documents), dim=1)
            position, mask = kernels.document_mask(documents, T, dtype)
        if self.config.arch == 'gpt2':
            x = x + self.transformer.wpe.weight[position]
        else:
            x = F.rms_norm(x, x.shape[-1:], eps=RMS_EPS)
            rotary = self.cos[position].to(dtype), self.sin[position].to(dtype)  # ([B,] T, 1, 1, D)
        x = self.transformer.drop(x)
        if self.bf16_residual and dtype == torch.bfloat16:
            x = x.to(dtype)
        slots = [None] * self.config.n_layer
        if cache is not None:
            slots, mask = cache.slots(T), cache.mask_empty(mask, T, dtype)
        for block, layer_slots in zip(self.transformer.h, slots, strict=True):
            if self.activation_checkpointing and self.training:
                x = recompute(block, x, rotary, mask, layer_slots, use_reentrant=False)
            else:
                x = block(x, rotary, mask, layer_slots)
        if cache is not None:
            cache.n_tokens += T
        return self.transformer.ln_f(x)

    def head(self, x):
        """Return the logits of hidden states: (..., C) -> (..., V) float32."""
        return kernels.cap(self.lm_head(x).float(), self.softcap)

    def forward(self, idx, targets=None, cache=None, documents=None):
        """Return (B, T, V) logits and the mean loss; without targets (B, 1, V) and None, as in nanoGPT."""
        x = self.hidden(idx, cache, documents)
        if targets is None:
            return self.head(x[:, -1:]), None
        logits = self.head(x)
        return logits, F.cross_entropy(logits.flatten(0, 1), targets.flatten(), ignore_index=kernels.IGNORE)

    def loss(self, idx, targets, documents=None):
        """Return the summed cross entropy of all targets, 0-d float32, without keeping the logits."""
        x, targets = self.hidden(idx, documents=documents).flatten(0, 1), targets.flatten()
        n_rows = kernels.loss_chunk_rows(len(targets), self.loss_chunks, self.lm_head.weight)
        return self.cross_entropy(x, self.lm_head.weight, targets, n_rows, self.softcap)

    @torch.no_grad()
    def score(self, idx, targets, documents=None) -> Scores:
        """Return the cross entropy of each target, and whether its logit is the largest."""
        is_target = targets != kernels.IGNORE  # (B, T)
        x, target_ids = self.hidden(idx, documents=documents)[is_target], targets[is_target]  # (N, C), (N,)
        n_rows = kernels.loss_chunk_rows(len(target_ids), self.loss_chunks, self.lm_head.weight)
        losses, hits = [], []
        for x_chunk, target_chunk in zip(x.split(n_rows), target_ids.split(n_rows), strict=True):
            logits = self.head(x_chunk)  # (n_rows, V)
            losses.append(F.cross_entropy(logits, target_chunk, reduction='none'))
            hits.append(logits.argmax(dim=-1) == target_chunk)
        nats = torch.zeros(targets.shape, device=targets.device)
        nats[is_target] = torch.cat(losses)
        return Scores(nats, torch.zeros_like(is_target).masked_scatter(is_target, torch.cat(hits)))

    def get_num_params(self, non_embedding: bool = True) -> int:
        """Count the parameters; without the position embedding by default, as nanoGPT counts them."""
        n = sum(p.numel() for p in self.parameters())
        has_wpe = self.config.arch == 'gpt2'
        return n - self.transformer.wpe.weight.numel() if non_embedding and has_wpe else n

    def flops_per_token(self, T: int | None = None) -> int:
        """Count the floating-point operations of training per token of a row of T tokens: 6 per matrix
        weight, and 12 T C per layer for attention (arXiv:2204.02311).
        """
        n_weights = sum(m.weight.numel() for m in self.modules() if isinstance(m, nn.Linear))
        return 6 * n_weights + 12 * self.config.n_layer * self.config.n_embd * (T or self.config.block_size)

    @torch.no_grad()
    def crop_block_size(self, block_size: int):
        """Keep the first block_size positions."""
        if block_size > self.config.block_size:
            raise ValueError(f'block_size={block_size} is larger than the {self.config.block_size} of these '
                             'weights: use that or less')
        self.config.block_size = block_size
        if self.config.arch == 'gpt2':
            self.transformer.wpe.weight = nn.Parameter(self.transformer.wpe.weight[:block_size].clone())
            self.transformer.wpe.num_embeddings = block_size
        else:
            self.cos, self.sin = self.cos[:block_size], self.sin[:block_size]

    @classmethod
    def from_pretrained(cls, name_or_folder, dropout=0.0, block_size=None, dtype=None):
        """Load one of GPT-2's four sizes, a folder in transformers' format, or an .npz file, on the CPU.

        block_size  keep the first positions only; None = all
        dtype       of the parameters, converted one by one as they are read; None = torch.float32
        raises      ValueError, OSError for a model that is missing, damaged or of another architecture
        """
        from weights import pretrained  # keeps model.py usable with kernels.py alone
        path = pretrained.find(name_or_folder)
        with torch.device('meta'):  # skip the initialization
            config = GPTConfig(**pretrained.read_model_args(path), dropout=dropout)
            model = cls(config).to(dtype or torch.float32)
        model.to_empty(device='cpu')
        if model.config.arch == 'gpt2':
            model.transformer.wte.weight = model.lm_head.weight  # to_empty() untied them
        else:
            model.cos, model.sin = rotary_table(model.config)
        pretrained.fill(model, path)
        model.crop_block_size(block_size or model.config.block_size)
        return model

    def save_pretrained(self, folder, tokenizer=None, chat_template=None):
        """Write a folder for AutoModelForCausalLM and AutoTokenizer, or an .npz file. Return the paths."""
        from weights import pretrained
        return pretrained.save(self, folder, tokenizer, chat_template)

    def pack(self, quantize: str | None = None):
        """Lay the matrices out for fast generation on a CPU, in bfloat16 or in 'int8': for inference only."""
        kernels.pack_linears(self, quantize)
        return self

    def compile_blocks(self):
        """Compile the blocks for generation: one graph serves all blocks and tokens."""
        for block in self.transformer.h:
            block.compile(dynamic=False)
        self.compiled = True

    @torch.inference_mode()
    def stream(self, idx, max_new_tokens, *, temperature=1.0, top_k=None, top_p=None, vocab_size=None,
               documents=None) -> Iterator[torch.Tensor]:
        """Yield the next token of each row, (B,) int64, max_new_tokens times.

        idx          (B, T) int64, T >= 1: the prompts
        temperature  0 = always the most likely token
        top_k        draw among the k most likely tokens; None or 0 = all
        top_p        draw among the fewest tokens of this total probability (arXiv:1904.09751); None = all
        vocab_size   draw ids below this only, because the rest are padding; None = all
        documents    (B, T) int64, as in hidden(); new tokens join the last document of the row. Pad short
                     prompts on the left: document 0 is the padding, 1 the prompt

        Beyond block_size the context slides. Every cached key then depends on a dropped token, so each new
        token costs a forward pass over block_size tokens without a cache.
        """
        if idx.size(1) == 0:
            raise ValueError('the prompt is empty: give the model at least one token to continue')
        limit, cache, new = self.config.block_size, None, idx
        if idx.size(1) < limit:
            n_tokens = min(limit, idx.size(1) + max_new_tokens)
            dtype = kernels.compute_dtype(self.transformer.wte.weight)
            cache = kernels.KVCache(self.config, idx.size(0), n_tokens, idx.device, dtype, self.compiled)
        for _ in range(max_new_tokens):
            if cache is not None and cache.n_tokens + new.size(1) > limit:
                cache = None
            context = new if cache is not None else idx[:, -limit:]  # (B, T)
            context_documents = None if documents is None else documents[:, -context.size(1):]
            with kernels.decoding(context, cache):
                logits, _ = self(context, cache=cache, documents=context_documents)
            next_id = draw(logits[:, -1, :vocab_size], temperature, top_k, top_p)  # (B,)
            new = next_id[:, None]
            idx = torch.cat((idx, new), dim=1)
            if documents is not None:
                documents = torch.cat((documents, documents[:, -1:]), dim=1)
            yield next_id

    def generate(self, idx, max_new_tokens, temperature=1.0, top_k=None, top_p=None, vocab_size=None):
        """Return the prompts and max_new_tokens drawn after them: (B, T + max_new_tokens). See stream()."""
        new = self.stream(idx, max_new_tokens, temperature=temperature, top_k=top_k, top_p=top_p,
                          vocab_size=vocab_size)
        return torch.cat([idx, *(next_id[:, None] for next_id in new)], dim=1)


def draw(logits, temperature, top_k, top_p):
    """Draw one token a row from logits (B, V): (B,) int64. Arguments as in GPT.stream()."""
    if temperature < 1e-6:  # every other probability underflows in float32
        return logits.argmax(dim=-1)
    logits, order = logits / temperature, None
    if top_k and top_k < logits.size(-1):  # drawing among k is 1 ms a row faster than among V
        logits, order = logits.topk(top_k)
    p = logits.softmax(dim=-1)  # (B, V) or (B, k)
    if top_p is not None and top_p < 1.0:
        if order is None:
            p, order = p.sort(descending=True, dim=-1)
        p = p.masked_fill(p.cumsum(dim=-1) - p >= top_p, 0.0)  # the most likely token always stays
    choice = torch.multinomial(p, 1)  # (B, 1)
    return (choice if order is None else order.gather(1, choice))[:, 0]
