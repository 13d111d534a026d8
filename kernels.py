"""The tensor operations of model.py: attention, KV cache, sampling, cross entropy in chunks, packed layers.

B batch, H query heads, G key heads, D head size, T tokens, S keys, C width, V vocabulary, N rows of the loss
"""

import contextlib
import ctypes
import math
import sys
import warnings
from typing import NamedTuple

import torch
import torch.nn as nn
from torch.nn import functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel

IGNORE = -100  # marks a position without target, as in torch's cross_entropy and transformers
CHUNK_BYTES = {'cpu': 256 << 20}  # of float32 logits in a chunk of the loss; 1 GB on other devices


def compute_dtype(x):
    """Return the dtype of matrix products that start from x: autocast's where it is on."""
    kind = x.device.type
    return torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else x.dtype


def gelu_tanh(x):
    """Apply GPT-2's GELU, the tanh approximation."""
    # in bfloat16 on a CPU the exact GELU is five times as fast; it differs by less than the rounding
    exact = x.device.type == 'cpu' and x.dtype == torch.bfloat16
    return F.gelu(x, approximate='none' if exact else 'tanh')


ACTIVATIONS = {
    'gelu_tanh': gelu_tanh,
    'gelu': F.gelu,
    'relu2': lambda x: F.relu(x).square(),  # arXiv:2109.08668 (Primer)
    'silu': F.silu,
}


# -----------------------------------------------------------------------------
# attention


def attention(q, k, v, mask, dropout):
    """Return softmax(q k' / sqrt(D)) v: q (B, H, T, D), k and v (B, G, S, D) -> (B, H, T, D).

    Each head of k and v serves H / G heads of q.
    mask  added to the scores, expands to (B, H, T, S); None = causal, or all S tokens if T is 1
    """
    if mask is None or not prefers_matmul(q, q.size(2)):
        is_causal = mask is None and q.size(2) > 1
        is_grouped = k.size(1) < q.size(1)
        return F.scaled_dot_product_attention(q, k, v, mask, dropout, is_causal, enable_gqa=is_grouped)
    if k.size(1) < q.size(1):
        k, v = (x.repeat_interleave(q.size(1) // x.size(1), dim=1) for x in (k, v))
    mask = mask.expand(*q.shape[:3], k.size(2)).flatten(0, 1)
    q_rows, k_rows, v_rows = q.flatten(0, 1), k.flatten(0, 1), v.flatten(0, 1)  # (B * H, T or S, D)
    scores = torch.baddbmm(mask, q_rows, k_rows.mT, alpha=q.size(-1) ** -0.5)  # (B * H, T, S)
    return (F.dropout(scores.softmax(dim=-1), dropout) @ v_rows).view_as(q)


def prefers_matmul(x, T):
    """Whether attention is faster as two matrix products than by torch's fused kernel.

    For training in bfloat16 on a CPU: there the fused backward pass takes 2 to 6 times as long up to T = 256,
    and up to a third longer at 512. Longer rows need too much memory.
    """
    trains = torch.is_grad_enabled()
    return x.device.type == 'cpu' and compute_dtype(x) == torch.bfloat16 and T <= 512 and trains


def causal_mask(x, n_seen):
    """Return the (T, S) mask for x (B, T, C) after n_seen cached tokens; None if attention() needs none."""
    T = x.size(1)
    if T == 1 or not (n_seen or prefers_matmul(x, T)):
        return None
    mask = torch.full((T, n_seen + T), -math.inf, device=x.device, dtype=compute_dtype(x))
    return mask.triu(n_seen + 1)


def document_mask(documents, dtype):
    """Restrict each token to its own document.

    documents  (B, T) int64  number of the document that each token belongs to
    returns    (B, T) int64 positions in the document, and the (B, 1, T, T) mask, 0 or -inf
    """
    same = documents[:, :, None] == documents[:, None]  # (B, T, T)
    index = torch.arange(documents.size(1), device=documents.device)
    masked = ~same | (index > index[:, None])
    mask = torch.zeros_like(same, dtype=dtype).masked_fill(masked, -math.inf)
    first = same.int().argmax(dim=-1)  # (B, T)
    return index - first, mask[:, None]


def store(k, v, keys, values, positions):
    """Write k and v (B, G, T, D) to the positions (T,) or (B, T) of a cache. Return it, (B, G, S, D) each."""
    if positions.dim() == 1:
        return keys.index_copy_(2, positions, k), values.index_copy_(2, positions, v)
    index = positions[:, None, :, None].expand_as(k)
    return keys.scatter_(2, index, k), values.scatter_(2, index, v)


class KVCache:
    """Keys and values of the tokens seen so far: two (B, G, max_tokens, D) a layer, allocated once."""

    def __init__(self, config, batch_size, max_tokens, device, dtype, static=False):
        self.static = static  # a new token attends to all slots, the empty ones masked: shapes never change
        self.max_tokens = -(-max_tokens // 64) * 64 if static else max_tokens  # suits GPU kernels
        shape = batch_size, config.n_kv_head, self.max_tokens, config.head_size
        # zeros: a masked slot must not hold a NaN
        kv = torch.zeros(config.n_layer, 2, *shape, device=device, dtype=dtype)
        self.kv = [layer.unbind(0) for layer in kv]
        self.n_tokens = 0  # tokens stored; GPT.hidden() advances it after the last layer

    def extend(self, x):
        """Make room for x (B, T, C). Return its positions, its mask, and arguments of store() by layer."""
        T, end = x.size(1), self.n_tokens + x.size(1)
        mask, S = causal_mask(x, self.n_tokens), end
        if self.static and T == 1:  # mask the empty slots
            S = self.max_tokens
            if mask is None:
                mask = torch.zeros(1, end, device=x.device, dtype=compute_dtype(x))
            mask = F.pad(mask, (0, S - end), value=-math.inf)
        slots = torch.arange(self.n_tokens, end, device=x.device)  # a tensor: a graph would fix a number
        layers = [(keys[:, :, :S], values[:, :, :S], slots) for keys, values in self.kv]
        return slice(self.n_tokens, end), mask, layers


@contextlib.contextmanager
def decoding(context, cache):
    """Set torch up for a forward pass over the context, (B, T), in generation."""
    with contextlib.ExitStack() as stack:
        if cache is not None and context.size(1) > 1:  # a prompt: each length would be compiled anew
            stack.enter_context(torch.compiler.set_stance('force_eager'))
        if context.device.type == 'cuda':  # no cuDNN: it plans for 23 to 37 ms for each new length
            backends = [SDPBackend.FLASH_ATTENTION, SDPBackend.EFFICIENT_ATTENTION, SDPBackend.MATH]
            stack.enter_context(sdpa_kernel(backends))
        yield


def draw(logits, temperature, top_k, top_p, generator=None):
    """Draw one token a row from logits (B, V): (B,) int64. Arguments as in GPT.stream()."""
    if temperature < 1e-6:  # 0 = greedy
        return logits.argmax(dim=-1)
    logits, order = logits / temperature, None
    if top_k and top_k < logits.size(-1):  # drawing among k is 1 ms a row faster than among V
        logits, order = logits.topk(top_k)
    p = logits.softmax(dim=-1)  # (B, V) or (B, k)
    if top_p is not None and top_p < 1.0:
        if order is None:
            p, order = p.sort(descending=True, dim=-1)
        is_rest = p.cumsum(dim=-1) - p >= top_p
        is_rest[:, 0] = False  # the most likely token always stays
        p = p.masked_fill(is_rest, 0.0)
    choice = torch.multinomial(p, 1, generator=generator)  # (B, 1)
    return (choice if order is None else order.gather(1, choice))[:, 0]


# -----------------------------------------------------------------------------
# the loss in chunks


class Scores(NamedTuple):
    nats: torch.Tensor  # (B, T) float32 cross entropy, 0 where there is no target
    is_argmax: torch.Tensor  # (B, T) bool, whether the target has the largest logit


def loss_chunk_rows(n_rows, n_chunks, weight):
    """Return how many rows of logits to hold at a time, for n_chunks of about the same size.

    n_chunks  'auto' = as many as keep a chunk within CHUNK_BYTES, in multiples of 128 rows
    """
    if n_chunks != 'auto':
        return max(-(-n_rows // max(n_chunks, 1)), 1)
    n_bytes = CHUNK_BYTES.get(weight.device.type, 1 << 30)
    fitting = max(n_bytes // (4 * weight.size(0)) // 128 * 128, 128)
    per_chunk = -(-n_rows // max(-(-n_rows // fitting), 1))
    return max(min(n_rows, -(-per_chunk // 128) * 128), 1)


def cap(logits, softcap):
    """Limit logits to +-softcap; None = no limit."""
    return logits if softcap is None else softcap * torch.tanh(logits / softcap)


def cross_entropy(x, weight, targets, n_rows, softcap):
    """Return the summed cross entropy of the logits cap(x weight'), 0-d float32.

    x (N, C), weight (V, C) of the head, targets (N,) int64; n_rows rows of logits are in memory at a time
    """
    if n_rows < len(targets):
        return ChunkedCrossEntropy.apply(x, weight, targets, n_rows, softcap, compute_dtype(x))
    logits = cap(F.linear(x, weight).float(), softcap)
    return F.cross_entropy(logits, targets, ignore_index=IGNORE, reduction='sum')


class ChunkedCrossEntropy(torch.autograd.Function):
    """Compute the gradients in the forward pass, chunk by chunk, and keep them instead of the logits."""

    @staticmethod
    def forward(ctx, x, weight, targets, n_rows, softcap, dtype):
        w = weight.to(dtype)
        loss = x.new_zeros((), dtype=torch.float32)
        grads_x, grad_weight = [], None
        if ctx.needs_input_grad[1]:
            grad_weight = torch.zeros_like(weight, dtype=torch.float32)
        for rows, target in zip(x.split(n_rows), targets.split(n_rows), strict=True):
            rows, valid = rows.to(dtype), (target != IGNORE)[:, None]
            logits = (rows @ w.t()).float()  # (n_rows, V)
            losses, grad = cross_entropy_gradient(logits, target.clamp(min=0)[:, None], softcap)
            # not `loss +=`: compiled by torch 2.11, that gives zero gradients (pytorch issue 180642)
            loss = loss + (losses * valid).sum()
            grad = (grad * valid).to(dtype)
            grads_x.append((grad @ w).to(x.dtype))
            if grad_weight is not None:
                grad_weight += grad.t() @ rows
        grad_weight = None if grad_weight is None else grad_weight.to(weight.dtype)
        ctx.save_for_backward(torch.cat(grads_x), grad_weight)
        return loss

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, grad_loss):
        grad_x, grad_weight = ctx.saved_tensors
        if grad_weight is not None:
            grad_weight = grad_weight * grad_loss
        return grad_x * grad_loss, grad_weight, None, None, None, None


def cross_entropy_gradient(logits, target, softcap):
    """Return the cross entropy of each row, (n, 1), and its gradient by the uncapped logits, (n, V).

    logits  (n, V) float32, overwritten
    target  (n, 1) int64, 0 .. V - 1
    """
    slope = None
    if softcap:
        logits = logits.div_(softcap).tanh_()
        slope = 1 - logits.square()
        logits = logits.mul_(softcap)
    lse = logits.logsumexp(dim=-1, keepdim=True)  # (n, 1)
    if torch.compiler.is_compiling():
        # inductor fuses a comparison; gather and scatter would write the probabilities to memory in float32
        is_target = torch.arange(logits.size(1), device=logits.device) == target  # (n, V)
        losses = lse - torch.where(is_target, logits, 0.0).sum(dim=-1, keepdim=True)
        grad = torch.exp(logits - lse) - is_target.float()
    else:
        losses = lse - logits.gather(1, target)
        grad = logits.sub_(lse).exp_()
        grad.scatter_add_(1, target, -torch.ones_like(lse))
    if slope is not None:
        grad = grad.mul_(slope)
    return losses, grad


# -----------------------------------------------------------------------------
# linear layers for generation on a CPU

HAS_FBGEMM = 'fbgemm' in torch.backends.quantized.supported_engines
HAS_INT8 = hasattr(torch, 'quantize_per_channel')  # its end is announced, pytorch issue 184982


class RowLinear(nn.Module):
    """Weights in 16 bits as they are; a tied head shares the embedding's."""

    def __init__(self, linear):
        super().__init__()
        self.weight, self.bias = linear.weight, linear.bias

    def forward(self, x):
        if x.numel() > x.size(-1):
            return F.linear(x, self.weight.to(x.dtype), self.bias)
        torch._C._set_mkldnn_enabled(False)  # for one row torch's own kernel reads memory twice as fast
        try:
            return F.linear(x.to(self.weight.dtype), self.weight, self.bias).to(x.dtype)
        finally:
            torch._C._set_mkldnn_enabled(True)


class BFloat16Linear(nn.Module):
    """Weights in oneDNN's blocks, for bfloat16 x of several rows."""

    def __init__(self, linear):
        super().__init__()
        self.bias = linear.bias
        self.packed = torch.ops.mkldnn._reorder_linear_weight(linear.weight.detach(), 1)  # 1 is fastest

    def forward(self, x):
        return torch.ops.mkldnn._linear_pointwise(x, self.packed, self.bias, 'none', [], '')


class QuantizedLinear(nn.Module):
    """The base of the layers that torch.ops.quantized multiplies, for float32 x."""

    def __init__(self, linear):
        super().__init__()
        self.bias = linear.bias
        parts = linear.weight.detach().split(8192)  # the copies in float32 stay small
        self.parts = [self.pack(rows.float()) for rows in parts]

    def forward(self, x):
        y = [self.multiply(x, part) for part in self.parts]
        y = torch.cat(y, dim=-1) if len(y) > 1 else y[0]
        return y if self.bias is None else y.add_(self.bias)


class Float16Linear(QuantizedLinear):
    """Weights in float16 in FBGEMM's blocks."""

    def pack(self, rows):
        return torch.ops.quantized.linear_prepack_fp16(rows, None)

    def multiply(self, x, part):
        return torch.ops.quantized.linear_dynamic_fp16(x, part)


class Int8Linear(QuantizedLinear):
    """Weights in int8 with a scale per output. Each row of x is rounded to 8 bits with a scale of its own."""

    # without VNNI pairs of products are summed in 16 bits
    reduce_range = HAS_FBGEMM and not getattr(torch.cpu, '_is_vnni_supported', bool)()

    def pack(self, rows):
        scale = (rows.abs().amax(dim=1) / 127).clamp_(min=1e-12)
        zeros = torch.zeros(len(rows), dtype=torch.int64)
        with warnings.catch_warnings():
            warnings.simplefilter('ignore')
            quantized = torch.quantize_per_channel(rows, scale, zeros, 0, torch.qint8)
        return torch.ops.quantized.linear_prepack(quantized, None)

    def multiply(self, x, part):
        if x.numel() == x.size(-1):
            return torch.ops.quantized.linear_dynamic(x, part, self.reduce_range)
        scale = x.abs().amax(dim=-1, keepdim=True).clamp_(min=1e-30)  # linear_dynamic has one for all rows
        return torch.ops.quantized.linear_dynamic(x / scale, part, self.reduce_range).mul_(scale)


def pack_linears(model, quantize=None, n_rows=1):
    """Rearrange the matrices of a model on the CPU for generation. It can no longer be trained.

    quantize  'int8', or None: float16 (all but the weights is then float32) and bfloat16, if that is faster
    n_rows    rows at a time; with several, a tied head becomes a matrix of its own
    returns   the dtype that all but the weights now has; None = unchanged
    """
    rows, head = model.transformer.wte.weight, model.lm_head
    kind, dtype = rows.device.type, rows.dtype
    if quantize and kind != 'cpu':
        raise ValueError(f'quantize={quantize} works on the CPU, the model is on {kind}: '
                         'use --device=cpu, or leave it out')
    if quantize and not HAS_INT8:
        print(f'quantize={quantize}: PyTorch {torch.__version__} has no int8 matrices, continuing without')
        quantize = None
    has_bfloat16 = torch.backends.mkldnn.is_available() and torch.ops.mkldnn._is_mkldnn_bf16_supported()
    if quantize:
        layer = Int8Linear
    elif kind == 'cpu' and dtype == torch.float16 and HAS_FBGEMM:
        layer = Float16Linear
    elif kind == 'cpu' and dtype == torch.bfloat16 and has_bfloat16:
        layer = RowLinear if n_rows == 1 else BFloat16Linear
    else:
        return None
    model.eval().requires_grad_(False)
    if layer is Float16Linear and head.weight is rows and n_rows == 1:
        model.lm_head = RowLinear(head)
    del head
    libc = ctypes.CDLL(None) if sys.platform == 'linux' else None
    return_memory = getattr(libc, 'malloc_trim', lambda n_bytes: None)
    parents = [module for module in model.modules() if not isinstance(module, nn.Linear)]
    for parent in reversed(parents):  # the head last
        for name, child in parent.named_children():
            if type(child) is nn.Linear:  # not one with an adapter
                setattr(parent, name, layer(child))
                del child
                return_memory(0)
    if issubclass(layer, QuantizedLinear):
        for p in model.parameters():
            p.data = p.data if p is rows else p.data.float()
        model.transformer.wte.register_forward_hook(lambda *args: args[-1].float())
        return torch.float32
    return None
