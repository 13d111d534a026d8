"""GPT in one file: GPT-2 as OpenAI released it (arch='gpt2') and its modern sibling (arch='modern').

    from model import GPT, GPTConfig
    model = GPT(GPTConfig(vocab_size=65, block_size=64, n_layer=4, n_head=4, n_embd=128))
    logits, loss = model(idx, targets)
    ids = model.generate(idx, max_new_tokens=100, temperature=0.8, top_k=200)

gpt2    learned positions, LayerNorm, GELU, the head tied to the embedding; parameter names as in nanoGPT.
modern  rotary positions, then query-key norm, ReLU squared, RMSNorm without weights (also after the embedding), no biases,
        an untied head that starts at zero, logits capped at +-15: what transformers ships as `nanochat`.

Sizes: B batch, T tokens in a row, C n_embd, H n_head, D = C / H, V vocab_size, L n_layer.
"""

import math
from dataclasses import dataclass

import torch
import torch.nn as nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint as recompute

RMS_EPS = 1e-6  # transformers' NanoChatConfig.rms_norm_eps
ROPE_THETA = 10_000.0
LOGIT_SOFTCAP = 15.0
IGNORE = -100  # the target that is not one, as in torch's cross_entropy and transformers
LOSS_CHUNK_BYTES = 256 << 20  # of float32 logits in a chunk of the loss, with loss_chunks='auto'


# -----------------------------------------------------------------------------
# configuration


@dataclass
class GPTConfig:
    """Everything that fixes the function a checkpoint computes; all of it is stored beside the weights.

    bias        None = as the architecture has it (gpt2 True, modern False)
    activation  None = as the architecture has it: 'gelu_tanh' (GPT-2's own), 'relu2' (modern).
                'gelu', the exact one, is what nanoGPT trained with.
    raises      ValueError for shapes that do not fit together
    """

    block_size: int = 1024
    vocab_size: int = 50304  # GPT-2's 50257, padded to a multiple of 64 for the sake of matrix kernels
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
            if getattr(self, name) < 1:
                raise ValueError(f'{name}={getattr(self, name)}: accepted is 1 or more')
            if getattr(self, name) >= 2**31:
                raise ValueError(f'{name}={getattr(self, name)}: no machine holds that, give less')
        if self.n_embd % self.n_head:
            near = max(self.n_embd // self.n_head, 1) * self.n_head
            raise ValueError(f'n_embd={self.n_embd} is not divisible by n_head={self.n_head}: '
                             f'use n_embd={near} or {near + self.n_head}')
        if not 0.0 <= self.dropout < 1.0:
            raise ValueError(f'dropout={self.dropout}: accepted is 0.0 up to, not including, 1.0')
        modern = self.arch == 'modern'
        if modern and self.bias:
            raise ValueError('bias=True: arch=modern has no biases, use bias=False or arch=gpt2')
        if modern and self.n_embd // self.n_head % 2:
            raise ValueError(f'n_embd={self.n_embd} / n_head={self.n_head} is odd: rotary positions turn pairs, use an even head size')
        self.bias = not modern if self.bias is None else bool(self.bias)
        self.activation = self.activation or ('relu2' if modern else 'gelu_tanh')
        if self.activation not in ACTIVATIONS:
            raise ValueError(f'activation={self.activation} is unknown: accepted are {", ".join(ACTIVATIONS)}')


def gelu_tanh(x):
    """GPT-2's GELU. In bfloat16 on a CPU the exact one stands in, which is 4.8e-4 away at most, on average a sixth of the
    rounding or less: torch's kernel for the tanh takes five times as long."""
    return F.gelu(x, approximate='none' if x.device.type == 'cpu' and x.dtype == torch.bfloat16 else 'tanh')


ACTIVATIONS = {
    'gelu_tanh': gelu_tanh,
    'gelu': F.gelu,
    'relu2': lambda x: F.relu(x).square(),  # arXiv:2109.08668 (Primer)
}


# -----------------------------------------------------------------------------
# the network


def make_norm(config):
    if config.arch == 'modern':
        return nn.RMSNorm(config.n_embd, eps=RMS_EPS, elementwise_affine=False)
    return nn.LayerNorm(config.n_embd, bias=config.bias)


def rotary_table(config):
    """cos and sin of every position, (block_size, 1, 1, D) float32 each, laid out for rotate()."""
    D = config.n_embd // config.n_head
    frequency = ROPE_THETA ** (-torch.arange(0, D, 2, dtype=torch.float32) / D)
    angle = torch.outer(torch.arange(config.block_size, dtype=torch.float32), frequency)[:, None, None]  # (T, 1, 1, D/2)
    return torch.cat((angle.cos(), angle.cos()), dim=-1), torch.cat((angle.sin(), -angle.sin()), dim=-1)


def rotate(x, cos, sin):
    """Rotary position embedding in its half-split form (arXiv:2104.09864): x and the result are (B, T, ..., D)."""
    a, b = x.chunk(2, dim=-1)
    return x * cos + torch.cat((b, a), dim=-1) * sin


def attention(q, k, v, mask, dropout):
    """Softmax(q k' / sqrt(D)) v, causal: q (B, H, T, D), k and v (B, H, S, D) -> (B, H, T, D).

    mask  to add to the scores, of a shape that expands to (B, H, T, S); None = a token sees itself and those before
    """
    if mask is None or not by_products(q, q.size(2)):
        return F.scaled_dot_product_attention(q, k, v, attn_mask=mask, is_causal=mask is None and q.size(2) > 1, dropout_p=dropout)
    mask = mask.expand(*q.shape[:3], k.size(2)).flatten(0, 1)
    scores = torch.baddbmm(mask, q.flatten(0, 1), k.flatten(0, 1).mT, alpha=q.size(-1) ** -0.5)  # (B * H, T, S)
    return (F.dropout(scores.softmax(dim=-1), dropout) @ v.flatten(0, 1)).view_as(q)


def by_products(x, T):
    """Whether attention is faster as two matrix products: in bfloat16 on a CPU, where the backward pass of torch's fused kernel takes
    2 to 6 times as long up to T = 256; at 512 both together take up to a third longer. Its forward pass is the fastest; longer rows would cost memory."""
    return x.device.type == 'cpu' and compute_dtype(x) == torch.bfloat16 and T <= 512 and torch.is_grad_enabled()


def compute_dtype(x):
    """The dtype of the matrix products that start from x: autocast's where it is on."""
    return torch.get_autocast_dtype(x.device.type) if torch.is_autocast_enabled(x.device.type) else x.dtype


def isolate(documents, T, dtype):
    """For the last T tokens of rows that hold several documents: what keeps each to its own.

    documents  (B, S) int64  number of the document that each token belongs to
    returns    (B, T) int64 positions, counted from the first token of the document; (B, 1, T, S) mask to add, -inf at later tokens
               and at those of other documents
    """
    same = documents[:, -T:, None] == documents[:, None]  # (B, T, S)
    place = torch.arange(documents.size(1), device=documents.device)
    mask = torch.zeros_like(same, dtype=dtype).masked_fill(~same | (place > place[-T:, None]), -math.inf)
    return place[-T:] - same.int().argmax(dim=-1), mask[:, None]


class KVCache:
    """Keys and values of the tokens already seen, allocated once: for each layer two of (B, H, max_tokens, D)."""

    def __init__(self, config, batch_size, max_tokens, device, dtype):
        head_size = config.n_embd // config.n_head
        kv = torch.empty(config.n_layer, 2, batch_size, config.n_head, max_tokens, head_size, device=device, dtype=dtype)
        self.layers = [layer.unbind(0) for layer in kv]
        self.n_tokens = 0  # complete tokens; GPT.forward advances it after the last layer
        self.documents = torch.empty(batch_size, 0, dtype=torch.int64, device=device)  # of the tokens seen, where forward() was given any

    def append(self, layer, k, v):
        """Stores k and v (B, H, T, D) of one layer and returns all of that layer's: (B, H, n_tokens + T, D) twice."""
        keys, values = self.layers[layer]
        keys.narrow(2, self.n_tokens, k.size(2)).copy_(k)
        values.narrow(2, self.n_tokens, k.size(2)).copy_(v)
        end = self.n_tokens + k.size(2)
        return keys.narrow(2, 0, end), values.narrow(2, 0, end)


class PackedLinear(nn.Module):
    """A Linear for inference on a CPU, its weight laid out once: in oneDNN's blocks (bfloat16), or in int8 with a scale for each output."""

    def __init__(self, linear, quantize):
        super().__init__()
        weight, self.bias, self.scale = linear.weight.detach(), linear.bias, None
        if quantize == 'int8':
            self.scale = (weight.abs().amax(dim=1).float() / 127).clamp(min=1e-12).to(weight.dtype)  # (out,)
            self.weight = (weight.float() / self.scale.float()[:, None]).round().clamp(-127, 127).to(torch.int8)
        else:
            self.weight = torch.ops.mkldnn._reorder_linear_weight(weight, 1)  # for one row: what it picks unasked reads prompts a fifth slower

    def forward(self, x):
        if self.scale is None:
            return torch.ops.mkldnn._linear_pointwise(x, self.weight, self.bias, 'none', [], '')
        rows = x.flatten(0, -2)
        if len(rows) <= 16:  # beyond, its time grows with the rows
            y = torch.ops.aten._weight_int8pack_mm(rows, self.weight, self.scale)
        else:
            y = F.linear(rows, self.weight.to(x.dtype)) * self.scale  # int8 is exact in bfloat16
        y = y if self.bias is None else y + self.bias
        return y.view(*x.shape[:-1], -1)


class CausalSelfAttention(nn.Module):
    def __init__(self, config, layer):
        super().__init__()
        self.layer, self.n_head, self.dropout = layer, config.n_head, config.dropout
        self.c_attn = nn.Linear(config.n_embd, 3 * config.n_embd, bias=config.bias)
        self.c_proj = nn.Linear(config.n_embd, config.n_embd, bias=config.bias)
        self.resid_dropout = nn.Dropout(config.dropout)

    def forward(self, x, rotary, mask, cache):
        B, T, C = x.shape
        qkv = self.c_attn(x).view(B, T, 3, self.n_head, C // self.n_head)  # (B, T, 3, H, D)
        if rotary is None:
            q, k, v = qkv.unbind(2)  # (B, T, H, D) each
        else:
            qk = rotate(qkv[:, :, :2], *rotary)  # queries and keys take the same rotation and norm, so they take them together
            q, k = F.rms_norm(qk, qk.shape[-1:], eps=RMS_EPS).unbind(2)  # arXiv:2010.04245
            v = qkv[:, :, 2]
        q, k, v = (t.transpose(1, 2) for t in (q, k, v))  # (B, H, T, D)
        if cache is not None:
            k, v = cache.append(self.layer, k, v)  # (B, H, S, D): S tokens seen, these T the last of them
        y = attention(q, k, v, mask, self.dropout if self.training else 0.0)
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
    def __init__(self, config, layer):
        super().__init__()
        self.ln_1 = make_norm(config)
        self.attn = CausalSelfAttention(config, layer)
        self.ln_2 = make_norm(config)
        self.mlp = MLP(config)

    def forward(self, x, rotary, mask, cache):
        x = x + self.attn(self.ln_1(x), rotary, mask, cache)
        return x + self.mlp(self.ln_2(x))


class ChunkedCrossEntropy(torch.autograd.Function):
    """The summed cross entropy of many rows, without their (N, V) logits: each chunk of rows leaves its gradients and goes.

    x         (N, C)   what the head takes
    weight    (V, C)   of the head
    targets   (N,)     int64, -100 = not a target
    n_rows    rows in a chunk
    softcap   logits are capped at +- this; None = they are not
    dtype     of the matrix products
    """

    @staticmethod
    def forward(ctx, x, weight, targets, n_rows, softcap, dtype):
        w, loss = weight.to(dtype), x.new_zeros((), dtype=torch.float32)
        grad_x, grad_weight = torch.empty_like(x), torch.zeros_like(weight, dtype=torch.float32)
        for part, target, grad_part in zip(x.split(n_rows), targets.split(n_rows), grad_x.split(n_rows)):
            part, valid = part.to(dtype), target != IGNORE
            logits = (part @ w.t()).float()  # (n, V)
            if softcap:
                logits = logits.div_(softcap).tanh_().mul_(softcap)
            lse = logits.logsumexp(dim=-1)
            at_target = target.clamp(min=0)[:, None]
            loss += ((lse - logits.gather(1, at_target)[:, 0]) * valid).sum()
            slope = 1 - (logits / softcap).square_() if softcap else None
            grad = logits.sub_(lse[:, None]).exp_()  # the probabilities; less 1 at the target, the gradient of the logits
            grad.scatter_add_(1, at_target, -torch.ones_like(lse)[:, None])
            grad = (grad.mul_(slope) if softcap else grad).mul_(valid[:, None]).to(dtype)
            grad_part.copy_(grad @ w)
            grad_weight += grad.t() @ part
        ctx.save_for_backward(grad_x, grad_weight.to(weight.dtype))
        return loss

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, grad_loss):
        grad_x, grad_weight = ctx.saved_tensors
        return grad_x * grad_loss, grad_weight * grad_loss, None, None, None, None


class GPT(nn.Module):
    def __init__(self, config):
        super().__init__()
        self.config = config
        self.activation_checkpointing = False  # True: training keeps only what goes into each block, and computes the rest again
        parts = dict(wte=nn.Embedding(config.vocab_size, config.n_embd))
        if config.arch == 'gpt2':
            parts['wpe'] = nn.Embedding(config.block_size, config.n_embd)
        parts['drop'] = nn.Dropout(config.dropout)
        parts['h'] = nn.ModuleList(Block(config, layer) for layer in range(config.n_layer))
        parts['ln_f'] = make_norm(config)
        self.transformer = nn.ModuleDict(parts)
        self.lm_head = nn.Linear(config.n_embd, config.vocab_size, bias=False)
        self.softcap = LOGIT_SOFTCAP if config.arch == 'modern' else None
        self.loss_chunks = 0  # parts in which the loss is computed, forward() then returns no logits; 'auto' = where they are large
        if config.arch == 'gpt2':
            self.transformer.wte.weight = self.lm_head.weight
        else:
            cos, sin = rotary_table(config)
            self.register_buffer('cos', cos, persistent=False)
            self.register_buffer('sin', sin, persistent=False)
        self.init_weights()

    @torch.no_grad()
    def init_weights(self):
        """gpt2: N(0, 0.02), output projections smaller by sqrt(2 L) (the GPT-2 paper).
        modern: embedding N(0, 1), matrices with deviation 1/sqrt(C), output projections and head zero (nanochat)."""
        modern = self.config.arch == 'modern'
        for name, p in self.named_parameters():
            if p.dim() < 2:
                nn.init.zeros_(p) if name.endswith('bias') else nn.init.ones_(p)
            elif name.endswith('c_proj.weight'):
                nn.init.zeros_(p) if modern else nn.init.normal_(p, std=0.02 / math.sqrt(2 * self.config.n_layer))
            elif not modern:
                nn.init.normal_(p, std=0.02)
            elif name == 'lm_head.weight':
                nn.init.zeros_(p)
            elif name == 'transformer.wte.weight':
                nn.init.normal_(p)
            else:
                bound = math.sqrt(3 / self.config.n_embd)  # a uniform of this bound has deviation 1/sqrt(C)
                nn.init.uniform_(p, -bound, bound)

    def forward(self, idx, targets=None, reduction='mean', cache=None, documents=None):
        """Logits, and the cross entropy in nats where there are targets.

        idx        (B, T) int64
        targets    (B, T) int64, -100 = not a target; None: logits of the last position only, as in nanoGPT
        reduction  'mean' | 'sum' over targets; 'none' for (B, T) losses; 'targets' for logits and losses of the N targets alone,
                   row after row, which spares the head all other positions
        cache      KVCache of the tokens before idx
        documents  (B, T) int64, a number for each token, which then sees the tokens of its own number only, as if these alone were
                   the row: for several documents in a row, or padding before a prompt. None = a row is one document
        returns    (B, T, V), (B, 1, V) or (N, V) logits, None where the loss went in chunks; float loss, (B, T) or (N,) losses, or None
        raises     ValueError if the row, cached tokens included, is longer than block_size
        """
        B, T = idx.shape
        seen = cache.n_tokens if cache is not None else 0
        if seen + T > self.config.block_size:
            raise ValueError(f'{seen + T} tokens do not fit into block_size {self.config.block_size}')
        x = self.transformer.wte(idx)  # (B, T, C)
        dtype = compute_dtype(x)
        rotary = mask = None
        position = slice(seen, seen + T)
        if documents is not None:
            if cache is not None:
                documents = cache.documents = torch.cat((cache.documents, documents), dim=1)
            position, mask = isolate(documents, T, dtype)
        if self.config.arch == 'gpt2':
            x = x + self.transformer.wpe.weight[position]
        else:
            x = F.rms_norm(x, x.shape[-1:], eps=RMS_EPS)
            rotary = self.cos[position].to(dtype), self.sin[position].to(dtype)  # (T or B, T, 1, 1, D)
        if mask is None and T > 1 and (seen or by_products(x, T)):  # else attention()'s is_causal says it
            mask = torch.full((T, seen + T), -math.inf, device=x.device, dtype=dtype).triu(seen + 1)
        x = self.transformer.drop(x)
        for block in self.transformer.h:
            if self.activation_checkpointing and self.training:
                x = recompute(block, x, rotary, mask, cache, use_reentrant=False)
            else:
                x = block(x, rotary, mask, cache)
        if cache is not None:
            cache.n_tokens += T
        x = self.transformer.ln_f(x)
        if targets is None:
            return self.head(x[:, [-1]]), None
        if reduction == 'targets':
            scored = targets != IGNORE
            logits = self.head(x[scored])  # (N, V)
            return logits, F.cross_entropy(logits, targets[scored], reduction='none')
        n_chunks = self.loss_chunks
        if n_chunks == 'auto':
            n_chunks = -(-4 * B * T * self.config.vocab_size // LOSS_CHUNK_BYTES)
        if n_chunks > 1 and (reduction != 'none' or not torch.is_grad_enabled()):
            return None, self.chunked_loss(x, targets, reduction, n_chunks)
        logits = self.head(x)  # (B, T, V)
        loss = F.cross_entropy(logits.flatten(0, 1), targets.flatten(), ignore_index=IGNORE, reduction=reduction)
        return logits, loss.view(B, T) if reduction == 'none' else loss

    def chunked_loss(self, x, targets, reduction, n_chunks):
        """The loss of forward(), with the logits of one of n_chunks parts of the rows in memory at a time."""
        n_rows = -(-targets.numel() // n_chunks)
        x, flat = x.flatten(0, 1), targets.flatten()
        if torch.is_grad_enabled():
            loss = ChunkedCrossEntropy.apply(x, self.lm_head.weight, flat, n_rows, self.softcap, compute_dtype(x))
        else:
            parts = [F.cross_entropy(self.head(part), part_targets, ignore_index=IGNORE, reduction='none')
                     for part, part_targets in zip(x.split(n_rows), flat.split(n_rows))]
            loss = torch.cat(parts).view_as(targets) if reduction == 'none' else sum(part.sum() for part in parts)
        return loss / (flat != IGNORE).sum() if reduction == 'mean' else loss

    def head(self, x):
        logits = self.lm_head(x).float()
        return self.softcap * torch.tanh(logits / self.softcap) if self.softcap else logits

    # -------------------------------------------------------------------------
    # sizes and costs

    def get_num_params(self, non_embedding=True):
        """Parameters; without the position embedding unless asked, as nanoGPT counts them."""
        n = sum(p.numel() for p in self.parameters())
        return n - self.transformer.wpe.weight.numel() if non_embedding and 'wpe' in self.transformer else n

    def flops_per_token(self, T=None):
        """Floating-point operations of one forward and backward pass, per token of a row of T tokens.

        Each matrix weight costs a multiply and an add forward and twice that backward; so does each of the T x C products
        of scores and of values in a layer, causal or not, as the literature counts (arXiv:2204.02311, appendix B).
        """
        n_weights = sum(m.weight.numel() for m in self.modules() if isinstance(m, nn.Linear))
        return 6 * n_weights + 12 * self.config.n_layer * self.config.n_embd * (T or self.config.block_size)

    @torch.no_grad()
    def crop_block_size(self, block_size):
        """Forgets the positions past block_size: a model of 1024 positions goes on as one of block_size."""
        if block_size > self.config.block_size:
            raise ValueError(f'block_size={block_size} is larger than the {self.config.block_size} of these weights: use that or less')
        self.config.block_size = block_size
        if self.config.arch == 'gpt2':
            self.transformer.wpe.weight = nn.Parameter(self.transformer.wpe.weight[:block_size].clone())
            self.transformer.wpe.num_embeddings = block_size
        else:
            self.cos, self.sin = self.cos[:block_size], self.sin[:block_size]

    # -------------------------------------------------------------------------
    # from and to other libraries

    @classmethod
    def from_pretrained(cls, name_or_folder, dropout=0.0, block_size=None, dtype=None):
        """A model with the weights of GPT-2, of a folder in transformers' format, or of an .npz file; on the CPU.

        name_or_folder  gpt2, gpt2-medium, gpt2-large, gpt2-xl; a folder with config.json of model_type gpt2 or nanochat, and
                        model.safetensors, whole or in shards; x.npz as save_pretrained writes it
        block_size      fewer positions than the model has; None = all
        dtype           of the parameters, which are converted one by one as they are read; None = torch.float32
        raises          ValueError, OSError: one line, for what is not there, damaged or of another architecture
        """
        from weights import pretrained  # here, so that model.py alone suffices to train
        path = pretrained.find(name_or_folder)
        with torch.device('meta'):  # shapes only: no memory, no time spent on values that are replaced
            model = cls(GPTConfig(**pretrained.read_model_args(path), dropout=dropout)).to(dtype or torch.float32)
        model.to_empty(device='cpu')
        if model.config.arch == 'gpt2':
            model.transformer.wte.weight = model.lm_head.weight  # to_empty() took them apart
        else:
            model.cos, model.sin = rotary_table(model.config)
        pretrained.fill(model, path)
        if block_size is not None:
            model.crop_block_size(block_size)
        return model

    def save_pretrained(self, folder, tokenizer=None):
        """Writes the model, and the tokenizer given, as AutoModelForCausalLM and AutoTokenizer load them; returns the paths written.

        A name that ends in .npz gets a single file for NumPy instead. from_pretrained() gives the same model back from either.
        """
        from weights import pretrained
        return pretrained.save(self, folder, tokenizer)

    # -------------------------------------------------------------------------
    # sampling

    def pack(self, quantize=None):
        """Lays the matrices out for fast generation on a CPU, where that is known to help; the model cannot be trained or saved any more.

        quantize  None: bfloat16 weights, in another order. 'int8': of one byte each, symmetric, with a scale for each output
        returns   the model itself
        """
        weight = self.lm_head.weight
        blocks = weight.dtype == torch.bfloat16 and torch.backends.mkldnn.is_available() and torch.ops.mkldnn._is_mkldnn_bf16_supported()
        if quantize and weight.device.type != 'cpu':
            raise ValueError(f'quantize={quantize} is for the CPU, the model is on {weight.device.type}: use --device=cpu, or leave it out')
        if weight.device.type == 'cpu' and (quantize or blocks):
            for parent in list(self.modules()):
                for name, child in parent.named_children():
                    if isinstance(child, nn.Linear):
                        setattr(parent, name, PackedLinear(child, quantize))
        return self

    @torch.inference_mode()
    def stream(self, idx, max_new_tokens, temperature=1.0, top_k=None, top_p=None, vocab_size=None, use_cache=True, documents=None):
        """Yields the next token of each row, (B,) int64, max_new_tokens times.

        idx          (B, T) int64, T >= 1: the prompts
        temperature  0 = the most likely token
        top_k        draw among the k most likely; None or 0 = all
        top_p        draw among the fewest tokens whose probability reaches top_p (arXiv:1904.09751); None or 1 = all
        vocab_size   ids from here on are padding and never drawn; None = all are tokens
        use_cache    False recomputes every row for every token: the reference the cache is held against
        documents    (B, T) int64, as in forward(); what is drawn belongs to the last one. Prompts of several lengths are padded on the
                     left, with 0 for the padding and 1 for the prompt

        Past block_size the context is its last block_size tokens. Every key then depends on a token that has just left, so
        from there on each token costs a whole row, with a cache as without.
        """
        if idx.size(1) == 0:
            raise ValueError('the prompt is empty: a GPT continues text, give it at least one token')
        limit = self.config.block_size
        cache, new = None, idx
        if use_cache and idx.size(1) < limit:
            cache = KVCache(self.config, idx.size(0), min(limit, idx.size(1) + max_new_tokens), idx.device,
                            compute_dtype(self.transformer.wte.weight))
        for _ in range(max_new_tokens):
            if cache is not None and cache.n_tokens + new.size(1) > limit:
                cache = None
            context = new if cache is not None else idx[:, -limit:]
            logits, _ = self(context, cache=cache, documents=None if documents is None else documents[:, -context.size(1):])
            next_id = draw(logits[:, -1, :vocab_size], temperature, top_k, top_p)  # (B,)
            new = next_id[:, None]
            idx = torch.cat((idx, new), dim=1)
            documents = None if documents is None else torch.cat((documents, documents[:, -1:]), dim=1)
            yield next_id

    def generate(self, idx, max_new_tokens, temperature=1.0, top_k=None, top_p=None, vocab_size=None, use_cache=True):
        """The prompts with max_new_tokens drawn behind them: (B, T) -> (B, T + max_new_tokens). Arguments as in stream()."""
        new = self.stream(idx, max_new_tokens, temperature, top_k, top_p, vocab_size, use_cache)
        return torch.cat([idx, *(next_id[:, None] for next_id in new)], dim=1)


def draw(logits, temperature, top_k, top_p):
    """One token a row from logits (B, V), as stream() says: (B,) int64."""
    if temperature < 1e-6:  # what is left of the other tokens is below float32
        return logits.argmax(dim=-1)
    logits, order = logits / temperature, None
    if top_k and top_k < logits.size(-1):  # from here on only these k: a draw from 50,000 takes a millisecond a row
        logits, order = logits.topk(top_k)
    p = logits.softmax(dim=-1)  # (B, V) or (B, k)
    if top_p is not None and top_p < 1.0:
        if order is None:
            p, order = p.sort(descending=True, dim=-1)
        p = p.masked_fill(p.cumsum(dim=-1) - p >= top_p, 0.0)  # the first token always stays
    at = torch.multinomial(p, 1)  # (B, 1)
    return (at if order is None else order.gather(1, at))[:, 0]
