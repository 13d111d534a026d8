"""GPT in one file, in three architectures.

    from model import GPT, GPTConfig
    model = GPT(GPTConfig(vocab_size=65, block_size=64, n_layer=4, n_head=4, n_embd=128))
    logits, loss = model(idx, targets)
    ids = model.generate(idx, max_new_tokens=100, temperature=0.8, top_k=200)

gpt2    learned positions, LayerNorm, GELU, a head tied to the embedding; parameter names are nanoGPT's.
modern  rotary positions, query-key norm, ReLU squared, RMSNorm without weights (also after the embedding),
        an untied head that starts at zero, logits capped at +-15: the `nanochat` of transformers.
llama   rotary positions, RMSNorm, SwiGLU, grouped key and value heads: Llama, Qwen2, Qwen3, SmolLM2, Mistral.

B batch, T tokens in a row, S tokens seen so far, C n_embd, V vocab_size, L n_layer,
H n_head, G n_kv_head (heads of keys and values), D head_size.
"""

import math
from collections.abc import Iterator
from dataclasses import dataclass

import torch
import torch.nn as nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint as recompute

import kernels

LOGIT_SOFTCAP = 15.0
COUNTS = 'block_size', 'vocab_size', 'n_layer', 'n_head', 'n_embd', 'n_kv_head', 'head_size', 'n_hidden'
PRESETS = {
    'gpt2': dict(bias=True, activation='gelu_tanh', norm_eps=1e-5, qk_norm=False, tied=True),
    'modern': dict(bias=False, activation='relu2', norm_eps=1e-6, qk_norm=True, tied=False),
    'llama': dict(bias=False, activation='silu', norm_eps=1e-5, qk_norm=False, tied=False),
}


@dataclass
class GPTConfig:
    """The architecture of a model, stored beside its weights. None = the value that arch has by default."""

    block_size: int = 1024
    vocab_size: int = 50304  # GPT-2's 50257, padded to a multiple of 64 for the matrix kernels
    n_layer: int = 12
    n_head: int = 12
    n_embd: int = 768
    dropout: float = 0.0
    bias: bool | None = None  # of linear and LayerNorm layers
    arch: str = 'gpt2'
    activation: str | None = None  # nanoGPT uses gelu
    # for llama only; see train.py and, for rope_scaling, rotary_table()
    n_kv_head: int | None = None
    head_size: int | None = None
    n_hidden: int | None = None
    rope_theta: float = 10_000.0
    rope_scaling: dict | None = None
    norm_eps: float | None = None
    qk_norm: bool | None = None
    qkv_bias: bool = False
    tied: bool | None = None

    def __post_init__(self):
        if self.arch not in PRESETS:
            raise ValueError(f'arch={self.arch} is unknown: accepted are {", ".join(PRESETS)}')
        for name in COUNTS:
            value = getattr(self, name)
            if value is not None and not 1 <= value < 2**31:
                raise ValueError(f'{name}={value}: accepted is 1 or more, below 2**31')
        if not 0.0 <= self.dropout < 1.0:
            raise ValueError(f'dropout={self.dropout}: accepted is 0.0 or more, below 1.0')
        unit = self.n_head if self.arch == 'gpt2' else 2 * self.n_head  # rotary positions come in pairs
        if self.n_embd % unit and not (self.arch == 'llama' and self.head_size):
            raise ValueError(f'n_embd={self.n_embd}, n_head={self.n_head}: accepted is a multiple of {unit}')

        # None takes the value of arch; others are accepted where arch allows them
        values = dict(PRESETS[self.arch], n_kv_head=self.n_head, head_size=self.n_embd // self.n_head,
                      n_hidden=4 * self.n_embd, rope_theta=10_000.0, rope_scaling=None, qkv_bias=False)
        adjustable = dict(gpt2={'activation', 'bias'}, modern={'activation'}, llama=values.keys() - {'bias'})
        if self.arch == 'llama':
            values['n_hidden'] = 64 * math.ceil(self.n_embd / 24)  # 8/3 n_embd, up to a multiple of 64
        for name, value in values.items():
            if getattr(self, name) is None:
                setattr(self, name, value)
            if getattr(self, name) != value and name not in adjustable[self.arch]:
                raise ValueError(f'{name}={getattr(self, name)}: accepted with arch={self.arch} is {value}')
        if self.n_head % self.n_kv_head:
            raise ValueError(f'n_head={self.n_head} is not divisible by n_kv_head={self.n_kv_head}')
        if self.head_size % 2 and self.arch != 'gpt2':
            raise ValueError(f'head_size={self.head_size}: accepted is an even number')
        if self.activation not in kernels.ACTIVATIONS:
            accepted = ', '.join(kernels.ACTIVATIONS)
            raise ValueError(f'activation={self.activation} is unknown: accepted are {accepted}')


def make_norm(config):
    if config.arch == 'gpt2':
        return nn.LayerNorm(config.n_embd, eps=config.norm_eps, bias=config.bias)
    return nn.RMSNorm(config.n_embd, eps=config.norm_eps, elementwise_affine=config.arch == 'llama')


def rotary_table(config):
    """Return cos and sin of every position for rotate(): (block_size, 1, D) float32 each."""
    D, scaling = config.head_size, config.rope_scaling
    frequency = config.rope_theta ** (-torch.arange(0, D, 2, dtype=torch.float32) / D)
    if scaling:  # Llama 3: waves that are long against the original context become `factor` times as long
        n_waves = scaling['original_max_position_embeddings'] * frequency / (2 * math.pi)
        few, many = scaling['low_freq_factor'], scaling['high_freq_factor']
        kept = ((n_waves - few) / (many - few)).clamp(0, 1)
        frequency = frequency * (kept + (1 - kept) / scaling['factor'])
    position = torch.arange(config.block_size, dtype=torch.float32)
    angle = torch.outer(position, frequency)[:, None]  # (block_size, 1, D / 2)
    if config.arch == 'modern':  # nanochat rotates the other way round
        angle = -angle
    cos, sin = angle.cos(), angle.sin()
    return torch.cat((cos, cos), dim=-1), torch.cat((-sin, sin), dim=-1)


def rotate(x, cos, sin):
    """Apply rotary positions in their half-split form (arXiv:2104.09864) to x, (B, T, heads, D)."""
    a, b = x.chunk(2, dim=-1)
    return x * cos + torch.cat((b, a), dim=-1) * sin


class CausalSelfAttention(nn.Module):
    def __init__(self, config):
        super().__init__()
        self.config = config
        H, G, D = config.n_head, config.n_kv_head, config.head_size
        self.c_attn = nn.Linear(config.n_embd, (H + 2 * G) * D, bias=config.bias or config.qkv_bias)
        self.c_proj = nn.Linear(H * D, config.n_embd, bias=config.bias)
        if config.arch == 'llama' and config.qk_norm:
            self.q_norm = nn.RMSNorm(D, eps=config.norm_eps)
            self.k_norm = nn.RMSNorm(D, eps=config.norm_eps)
        self.resid_dropout = nn.Dropout(config.dropout)

    def forward(self, x, rotary, mask, slots):
        config = self.config
        B, T, _ = x.shape
        H, G, D = config.n_head, config.n_kv_head, config.head_size
        qk, v = self.c_attn(x).view(B, T, H + 2 * G, D).split((H + G, G), dim=2)
        if config.arch == 'llama' and config.qk_norm:
            q, k = qk.split((H, G), dim=2)
            qk = torch.cat((self.q_norm(q), self.k_norm(k)), dim=2).to(v.dtype)  # modern: after rotate()
        if rotary is not None:
            qk = rotate(qk, *rotary)  # queries and keys in one call
        if config.arch == 'modern':
            qk = F.rms_norm(qk, (D,), eps=config.norm_eps)  # arXiv:2010.04245
        q, k = qk.split((H, G), dim=2)  # (B, T, H, D), (B, T, G, D)
        q, k, v = q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2)  # (B, H or G, T, D)
        if slots is not None:  # of this layer in the cache
            k, v = kernels.store(k, v, *slots)  # (B, G, S, D)
        y = kernels.attention(q, k, v, mask, config.dropout if self.training else 0.0)
        y = y.transpose(1, 2).reshape(B, T, H * D)
        return self.resid_dropout(self.c_proj(y))


class MLP(nn.Module):
    def __init__(self, config):
        super().__init__()
        self.is_gated = config.arch == 'llama'  # SwiGLU (arXiv:2002.05202): c_fc returns gate and value
        self.c_fc = nn.Linear(config.n_embd, config.n_hidden * (1 + self.is_gated), bias=config.bias)
        self.c_proj = nn.Linear(config.n_hidden, config.n_embd, bias=config.bias)
        self.activation = kernels.ACTIVATIONS[config.activation]
        self.dropout = nn.Dropout(config.dropout)

    def forward(self, x):
        if not self.is_gated:
            return self.dropout(self.c_proj(self.activation(self.c_fc(x))))
        gate, value = self.c_fc(x).chunk(2, dim=-1)
        return self.dropout(self.c_proj(self.activation(gate) * value))


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


class GPT(nn.Module):
    def __init__(self, config: GPTConfig):
        super().__init__()
        self.config = config
        self.activation_checkpointing = False  # True: recompute blocks in the backward pass
        self.static_cache = False  # True: stream() keeps all shapes, for blocks that are compiled
        self.stream_dtype = None  # of the KV cache, if not the embedding's
        self.bf16_residual = False  # True: under bfloat16 autocast, sum the outputs of the blocks in bfloat16
        self.loss_chunks = 'auto'  # chunks of loss_sum() and score(); 'auto' = by size of the logits
        self.cross_entropy = kernels.cross_entropy  # may be compiled by itself
        layers = dict(wte=nn.Embedding(config.vocab_size, config.n_embd), drop=nn.Dropout(config.dropout))
        if config.arch == 'gpt2':
            layers['wpe'] = nn.Embedding(config.block_size, config.n_embd)
        layers['h'] = nn.ModuleList(Block(config) for _ in range(config.n_layer))
        layers['ln_f'] = make_norm(config)
        self.transformer = nn.ModuleDict(layers)
        self.lm_head = nn.Linear(config.n_embd, config.vocab_size, bias=False)
        self.softcap = LOGIT_SOFTCAP if config.arch == 'modern' else None
        self.set_derived_tensors()
        self.init_weights()

    def set_derived_tensors(self):
        """Tie the head to the embedding, and compute the rotary tables."""
        if self.config.tied:
            self.transformer.wte.weight = self.lm_head.weight
        if self.config.arch != 'gpt2':
            cos, sin = rotary_table(self.config)
            self.register_buffer('cos', cos, persistent=False)
            self.register_buffer('sin', sin, persistent=False)

    @torch.no_grad()
    def init_weights(self):
        """gpt2, llama: N(0, 0.02), output projections divided by sqrt(2 L) (the GPT-2 paper).
        modern: embedding N(0, 1), matrices of std 1/sqrt(C), output projections and head 0 (nanochat)."""
        modern = self.config.arch == 'modern'
        for name, p in self.named_parameters():
            if name.endswith('bias'):
                nn.init.zeros_(p)
            elif p.dim() < 2:
                nn.init.ones_(p)
            elif not modern:
                n_summed = 2 * self.config.n_layer if name.endswith('c_proj.weight') else 1
                nn.init.normal_(p, std=0.02 / math.sqrt(n_summed))
            elif name.endswith(('lm_head.weight', 'c_proj.weight')):
                nn.init.zeros_(p)
            elif name == 'transformer.wte.weight':
                nn.init.normal_(p)
            else:
                bound = math.sqrt(3 / self.config.n_embd)  # for a standard deviation of 1/sqrt(C)
                nn.init.uniform_(p, -bound, bound)

    def hidden(self, idx, cache=None, documents=None):
        """Run the network up to its last norm: (B, T) int64 -> (B, T, C).

        cache      KVCache of the tokens before idx, to which those of idx are added
        documents  (B, T) int64, the document of each token of packed rows, without a cache: tokens attend
                   within their document only, and positions count from its start
        """
        T = idx.size(1)
        n_seen = 0 if cache is None else cache.n_tokens
        if n_seen + T > self.config.block_size:
            raise ValueError(f'{n_seen + T} tokens do not fit into block_size {self.config.block_size}')
        x = self.transformer.wte(idx)  # (B, T, C)
        dtype = kernels.compute_dtype(x)

        # positions, attention mask, and room in the cache of each layer
        slots = [None] * self.config.n_layer
        if cache is not None:
            position, mask, slots = cache.extend(x)
        elif documents is not None:
            position, mask = kernels.document_mask(documents, dtype)
        else:
            position, mask = slice(T), kernels.causal_mask(x, 0)
        rotary = None
        if self.config.arch == 'gpt2':
            x = x + self.transformer.wpe.weight[position]
        else:
            rotary = self.cos[position].to(dtype), self.sin[position].to(dtype)  # ([B,] T, 1, D)

        if self.config.arch == 'modern':
            x = F.rms_norm(x, x.shape[-1:], eps=self.config.norm_eps)
        x = self.transformer.drop(x)
        if self.bf16_residual and dtype == torch.bfloat16:
            x = x.to(dtype)
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

    def loss_sum(self, idx, targets, documents=None):
        """Return the summed cross entropy of all targets, 0-d float32, without keeping the logits."""
        x, targets = self.hidden(idx, documents=documents).flatten(0, 1), targets.flatten()
        n_rows = kernels.loss_chunk_rows(len(targets), self.loss_chunks, self.lm_head.weight)
        return self.cross_entropy(x, self.lm_head.weight, targets, n_rows, self.softcap)

    @torch.no_grad()
    def score(self, idx, targets, documents=None) -> kernels.Scores:
        """Return the cross entropy of each target, and whether its logit is the largest."""
        is_target = targets != kernels.IGNORE  # (B, T)
        x, target_ids = self.hidden(idx, documents=documents)[is_target], targets[is_target]  # (N, C), (N,)
        n_rows = kernels.loss_chunk_rows(len(target_ids), self.loss_chunks, self.lm_head.weight)
        losses, are_largest = [], []
        for x_chunk, target_chunk in zip(x.split(n_rows), target_ids.split(n_rows), strict=True):
            logits = self.head(x_chunk)  # (n_rows, V)
            losses.append(F.cross_entropy(logits, target_chunk, reduction='none'))
            are_largest.append(logits.argmax(dim=-1) == target_chunk)
        nats = torch.zeros(targets.shape, device=targets.device)
        is_argmax = torch.zeros_like(is_target)
        nats[is_target], is_argmax[is_target] = torch.cat(losses), torch.cat(are_largest)
        return kernels.Scores(nats, is_argmax)

    def get_num_params(self, non_embedding: bool = True) -> int:
        """Count the parameters, by default without the position embedding, as nanoGPT does."""
        n = sum(p.numel() for p in self.parameters())
        if non_embedding and self.config.arch == 'gpt2':
            n -= self.transformer.wpe.weight.numel()
        return n

    def flops_per_token(self, T: int | None = None) -> int:
        """Count the floating-point operations of training per token of a row of T tokens (arXiv:2204.02311).

        A weight has 2 in the forward pass, 2 for the gradient of its input and, unless frozen, 2 for its own.
        """
        c = self.config
        n_flops = 12 * c.n_layer * c.n_head * c.head_size * (T or c.block_size)  # attention
        for module in self.modules():
            if isinstance(module, nn.Linear):
                for matrix in (p for p in module.parameters() if p.dim() == 2):  # three with an adapter
                    n_flops += (4 + 2 * matrix.requires_grad) * matrix.numel()
        return n_flops

    @torch.no_grad()
    def crop_block_size(self, block_size: int):
        """Keep the first positions."""
        if block_size > self.config.block_size:
            raise ValueError(f'block_size={block_size}: the model has positions for {self.config.block_size} '
                             f'tokens: use {self.config.block_size} or less')
        self.config.block_size = block_size
        if self.config.arch == 'gpt2':
            weight = self.transformer.wpe.weight[:block_size].clone()
            self.transformer.wpe = nn.Embedding.from_pretrained(weight, freeze=False)
        else:
            self.cos, self.sin = self.cos[:block_size], self.sin[:block_size]

    @classmethod
    def from_pretrained(cls, name_or_folder, dropout=0.0, block_size=None, dtype=None, vocab_size=None):
        """Load gpt2 to gpt2-xl, a folder in transformers' format, or an .npz file, on the CPU.

        block_size  keep the first positions only; None = all
        vocab_size  rows of embedding and head, padded to this number; None = those of the file
        """
        from weights import pretrained  # here, so that model.py works with kernels.py alone
        path = pretrained.find(name_or_folder)
        with torch.device('meta'):  # skip the initialization
            args = pretrained.read_model_args(path)
            config = GPTConfig(**args | dict(vocab_size=vocab_size or args['vocab_size'], dropout=dropout))
            model = cls(config).to(dtype or torch.float32)
        model.to_empty(device='cpu').set_derived_tensors()
        pretrained.fill(model, path, args['vocab_size'])
        model.crop_block_size(block_size or model.config.block_size)
        return model

    def save_pretrained(self, path, tokenizer=None, style=None, card='', quantize=None):
        """Write a folder that transformers loads, or an .npz or .gguf file. Return the paths."""
        from weights import pretrained
        return pretrained.save(self, path, tokenizer, style=style, card=card, quantize=quantize)

    def pack(self, quantize: str | None = None, n_rows: int = 1):
        """Prepare a model for generation on a CPU: kernels.pack_linears()."""
        self.set_derived_tensors()  # to() has rounded the rotary tables
        self.stream_dtype = kernels.pack_linears(self.to(self.lm_head.weight.device), quantize, n_rows)
        return self

    def compile_blocks(self):
        """Compile the blocks for one shape: of batches in training, of single tokens in generation."""
        for block in self.transformer.h:
            block.compile(dynamic=False)

    @torch.inference_mode()
    def stream(self, idx, max_new_tokens, *, temperature=1.0, top_k=None, top_p=None,
               vocab_size=None) -> Iterator[torch.Tensor]:
        """Yield the next token of each row, (B,) int64, max_new_tokens times.

        idx         (B, T) int64, T >= 1: the prompts
        top_k       draw among the k most likely tokens; None or 0 = all
        top_p       draw among the fewest tokens of this total probability (arXiv:1904.09751); None = all
        vocab_size  draw ids below this only, because the rest are padding; None = all

        Beyond block_size the context slides. Every cached key then depends on a dropped token, so each token
        costs a forward pass over block_size tokens.
        """
        if idx.size(1) == 0:
            raise ValueError('the prompt is empty: give the model at least one token to continue')
        limit = self.config.block_size
        cache, new = None, idx  # new = the tokens to run, those that are not in the cache
        if idx.size(1) < limit:
            n_tokens = min(limit, idx.size(1) + max_new_tokens)
            dtype = self.stream_dtype or kernels.compute_dtype(self.transformer.wte.weight)
            cache = kernels.KVCache(self.config, idx.size(0), n_tokens, idx.device, dtype,
                                    static=self.static_cache)
        for _ in range(max_new_tokens):
            if cache is None or cache.n_tokens + new.size(1) > limit:
                cache, new = None, idx[:, -limit:]
            with kernels.decoding(new, cache):
                logits, _ = self(new, cache=cache)
            next_id = kernels.draw(logits[:, -1, :vocab_size], temperature, top_k, top_p)  # (B,)
            new = next_id[:, None]
            idx = torch.cat((idx, new), dim=1)
            yield next_id

    def generate(self, idx, max_new_tokens, temperature=1.0, top_k=None, top_p=None, vocab_size=None):
        """Return the prompts and max_new_tokens drawn after them: (B, T + max_new_tokens). See stream()."""
        new = self.stream(idx, max_new_tokens, temperature=temperature, top_k=top_k, top_p=top_p,
                          vocab_size=vocab_size)
        return torch.cat([idx, *(next_id[:, None] for next_id in new)], dim=1)
