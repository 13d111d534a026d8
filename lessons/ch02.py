# %% [markdown] lang=en
# # Chapter 2: attention
#
# After chapter 1 a text is a row of tokens, and each token becomes a **vector** (向量), a list of numbers that the
# model learns. So far each vector knows only its own token. To understand "it" in a sentence, a model has to look at
# other tokens. **Attention** (注意力) does this: every token takes a weighted sum of the vectors before it, and the
# weights are computed from the vectors themselves.
#
# We take five small steps, print every shape, and end with the attention of `model.py`, whose numbers must equal ours.
# %% [markdown] lang=zh
# # 第二章　注意力
#
# 第一章把文本变成了一串词元。进了模型，每个词元对应一个**向量**（vector），也就是一组可以学习的数。
# 到这里为止，每个向量只知道自己是谁。要读懂一句话里的“它”，就得看看别的词元。
# **注意力**（attention）就是看的办法：每个词元对前面的向量求加权和，而权重由向量自己算出来。
#
# 我们分五小步走，每一步都把形状打印出来，最后走到 `model.py` 里的注意力：两边的数必须相等。
# %%
import math
import os
import sys
from pathlib import Path

# notebooks start in their own folder: go up to the repository's
os.chdir(next(folder for folder in (Path.cwd(), *Path.cwd().parents) if (folder / 'model.py').exists()))
sys.path.insert(0, '')

import torch
from torch import nn

import kernels
from lessons.helpers import picture, show
from model import CausalSelfAttention, GPTConfig

torch.manual_seed(0)
torch.set_printoptions(precision=2, sci_mode=False)
# %% [markdown] lang=en
# ## Step 1: a weighted sum
#
# Take T = 5 tokens, each a vector of C = 4 numbers. The simplest way to look back is the mean of all vectors up to and
# including the token's own. A token may not look ahead: the model will be trained to predict the next token, and must not
# see it. Attention that keeps to this rule is **causal** (因果).
# %% [markdown] lang=zh
# ## 第一步：加权和
#
# 取 T = 5 个词元，每个是 C = 4 个数的向量。最朴素的“往回看”，就是求从开头到自己为止所有向量的平均。
# 不许往后看：模型要学的是预测下一个词元，当然不能先看到答案。这就叫**因果**（causal）。
# %%
T, C = 5, 4
x = torch.randn(T, C)
mean = torch.stack([x[:t + 1].mean(dim=0) for t in range(T)])
print('x', tuple(x.shape), '-> mean', tuple(mean.shape))
print(mean)
# %% [markdown] lang=en
# The same can be written as one matrix product, `@` in Python: row t of `weights @ x` is the sum of all rows of x, each times a
# number from row t of `weights`. So row t of `weights` says how much token t takes from each token. (`tril` sets everything
# above the diagonal to zero.) Everything that follows only changes where these weights come from.
# %% [markdown] lang=zh
# 同样的事可以写成一次矩阵乘法，Python 里写作 `@`：`weights @ x` 的第 t 行，就是把 x 的各行分别乘以 `weights`
# 第 t 行里的数，再加起来。所以 `weights` 的第 t 行表示第 t 个词元从每个词元那里各取多少。
# （`tril` 把对角线上方全部置零。）后面的每一步，改的都只是这些权重从哪里来。
# %%
weights = torch.ones(T, T).tril()
weights = weights / weights.sum(dim=1, keepdim=True)
print(weights)
assert torch.allclose(weights @ x, mean, atol=1e-6)
# %% [markdown] lang=en
# ## Step 2: weights by softmax, and the mask
#
# Weights should be positive and sum to 1. **Softmax** makes such weights out of any numbers, the **scores** (分数):
# take e to the power of each, then divide by the sum. A score of minus infinity becomes a weight of exactly 0, because
# e to the power of minus infinity is 0. So the rule "do not look ahead" is written by *adding* a matrix to the scores: 0 where looking is
# allowed, `-inf` where it is not. This matrix is the **mask** (掩码);
# `triu(1)` keeps only the part above the diagonal.
# %% [markdown] lang=zh
# ## 第二步：softmax 和掩码
#
# 权重应当是正数，并且加起来等于 1。**softmax** 可以把任意一组**分数**（score）变成这样的权重：
# 每个数求 e 的幂，再除以总和。负无穷的分数得到的权重正好是 0，因为 e 的负无穷次幂等于 0。
# 所以“不许往后看”这条规矩，只要给分数**加上**一个矩阵就能表达：可以看的地方加 0，不可以看的地方加 `-inf`。
# 这个矩阵叫**掩码**（mask）；`triu(1)` 只保留对角线上方的部分。
# %%
def softmax(scores):
    powers = torch.exp(scores - scores.max(dim=-1, keepdim=True).values)  # the largest power is 1: no overflow
    return powers / powers.sum(dim=-1, keepdim=True)


mask = torch.full((T, T), -math.inf).triu(1)
print(mask)
scores = torch.zeros(T, T)  # no preference: the mean again
assert torch.allclose(softmax(scores + mask) @ x, mean, atol=1e-6)
assert torch.allclose(softmax(scores + mask), torch.softmax(scores + mask, dim=-1))
# %% [markdown] lang=en
# ## Step 3: query, key, value
#
# Now the scores come from the tokens. Each token makes three vectors out of its own, by three learned matrices:
#
# - a **query** (查询): what am I looking for?
# - a **key** (键): what do I offer to those who look?
# - a **value** (值): what do I hand over if chosen?
#
# The score between two tokens is the **dot product** (点积) of the query of one and the key of the other: multiply them
# number by number, and add up. It is large when the two vectors point the same way. `q @ k.T` computes all scores at once: row t, column s
# holds the score between query t and key s. The result is the weighted sum of the *values*.
#
# `nn.Linear(C, D)` holds such a matrix and turns C numbers into D. Here the matrices are still random.
# %% [markdown] lang=zh
# ## 第三步：查询、键、值
#
# 现在让分数由词元自己决定。每个词元的向量分别乘以三个学出来的矩阵，得到三个新向量：
#
# - **查询**（query）：我在找什么？
# - **键**（key）：别人来找的时候，我以什么示人？
# - **值**（value）：如果选中我，我交出什么？
#
# 一个词元的查询和另一个词元的键做**点积**（dot product），也就是对应的数相乘再求和，得到两者之间的分数：
# 方向越一致，分数越高。`q @ k.T` 一次算出全部分数：第 t 行第 s 列是查询 t 和键 s 之间的分数。
# 最后的结果是各个**值**的加权和。
#
# `nn.Linear(C, D)` 里就装着这样一个矩阵，把 C 个数变成 D 个。眼下矩阵里还是随机数。
# %%
D = 3
to_query, to_key, to_value = (nn.Linear(C, D, bias=False) for _ in range(3))
q, k, v = to_query(x), to_key(x), to_value(x)
scores = q @ k.T / math.sqrt(D)
weights = softmax(scores + mask)
y = weights @ v
print('q, k, v', tuple(q.shape), ' scores', tuple(scores.shape), ' y', tuple(y.shape))
print(weights.detach())
# %% [markdown] lang=en
# **Why divide by the square root of D?** A dot product sums D terms, so its spread grows like the square root of D. With large scores
# softmax gives nearly everything to one token, and its slope is nearly 0, so learning stands still. The table shows
# the largest of 16 weights for random queries and keys, on average.
# %% [markdown] lang=zh
# **为什么要除以 √D？** 点积是 D 项之和，D 越大，它的波动越大，大致和 √D 成正比。分数一大，softmax 就几乎把全部权重给了一个词元，
# 此时它的斜率接近 0，学不动了。下表用随机的查询和键，列出 16 个权重中最大的那个（平均值）。
# %%
print('   D   std of q.k   largest weight   with division')
for size in (4, 64, 1024):
    products = (torch.randn(500, 1, size) * torch.randn(500, 16, size)).sum(dim=-1)  # (500, 16)
    plain, scaled = (softmax(each).max(dim=-1).values.mean() for each in (products, products / math.sqrt(size)))
    print(f'{size:4}   {products.std():10.1f}   {plain:14.2f}   {scaled:13.2f}')
# %% [markdown] lang=en
# ## Step 4: several heads
#
# One set of weights can follow only one relation. So the C numbers are split among H **heads** (头) of D = C / H numbers each,
# every head has its own weights, and the results are put side by side again. No loop is needed: the heads become
# one more dimension of the tensors, and `@` multiplies the last two dimensions for all batches and heads at once.
# `view` splits a dimension in two, and `transpose` exchanges two dimensions.
#
# B is the number of rows (texts) computed together, the **batch** (批).
# %% [markdown] lang=zh
# ## 第四步：多头
#
# 一套权重只能跟踪一种关系。于是把 C 个数分给 H 个**头**（head），每个头 D = C / H 个数，各算各的权重，最后再拼起来。
# 不用写循环：头是张量多出来的一维，`@` 只对最后两维做矩阵乘法，所有的批次和头一次算完。
# `view` 把一维拆成两维，`transpose` 交换两维。
#
# B 是同时计算的文本条数，叫**批**（batch）。
# %%
B, T, C, H = 2, 6, 12, 4
D = C // H
x = torch.randn(B, T, C)
qkv = nn.Linear(C, 3 * C)  # the three matrices side by side
projection = nn.Linear(C, C)  # mixes the heads again


def attention(x, mask):
    B, T, C = x.shape
    q, k, v = qkv(x).view(B, T, 3, H, D).unbind(dim=2)  # (B, T, H, D) each
    q, k, v = q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2)  # (B, H, T, D)
    scores = q @ k.transpose(2, 3) / math.sqrt(D)  # (B, H, T, T)
    weights = torch.softmax(scores + mask, dim=-1)
    y = weights @ v  # (B, H, T, D)
    y = y.transpose(1, 2).reshape(B, T, C)  # heads side by side
    for name, tensor in dict(x=x, q=q, k=k, v=v, scores=scores, weights=weights, y=y).items():
        print(f'{name:8} {tuple(tensor.shape)}')
    return projection(y)


causal = torch.full((T, T), -math.inf).triu(1)
ours = attention(x, causal)
# %% [markdown] lang=en
# ## Step 5: other masks
#
# The mask alone decides who may see whom:
#
# - **causal**: each token sees itself and what came before.
# - **documents** (文档): several short texts lie in one row, and no token sees another text. The numbers of the
#   documents below are 0 0 0 1 1 1 1 2.
# - **cached** (缓存): when a model writes, keys and values of earlier tokens are kept. Only the new tokens have rows,
#   here the last 3 of 8 (chapter 5).
#
# The repository computes the same masks in `kernels.py`.
# %% [markdown] lang=zh
# ## 第五步：别的掩码
#
# 谁能看见谁，全由掩码决定，其余部分一概不动：
#
# - **因果**（causal）：每个词元看得见自己和前面的。
# - **文档**（documents）：一行里放着几篇短文，互相看不见。下图里文档的编号是 0 0 0 1 1 1 1 2。
# - **缓存**（cached）：模型写字的时候，前面词元的键和值都留着，只有新词元需要算，图中是 8 个词元里的最后 3 个（第五章）。
#
# 本仓库在 `kernels.py` 里算同样的掩码。
# %%
S = 8
documents = torch.tensor([[0, 0, 0, 1, 1, 1, 1, 2]])
look_ahead = torch.ones(S, S, dtype=torch.bool).triu(1)
other_document = documents[0][:, None] != documents[0]
masks = {
    'causal': torch.zeros(S, S).masked_fill(look_ahead, -math.inf),
    'documents': torch.zeros(S, S).masked_fill(look_ahead | other_document, -math.inf),
    'cached': torch.zeros(S, S).masked_fill(look_ahead, -math.inf)[-3:],
}
positions, from_kernels = kernels.document_mask(documents, torch.float32)
assert torch.equal(masks['documents'], from_kernels[0, 0])
assert torch.equal(masks['cached'], kernels.causal_mask(torch.zeros(1, 3, C), n_seen=5))
print('position within the document', positions[0].tolist())

figure = picture(9, 3.2)
for axes, (name, each) in zip(figure.subplots(1, 3), masks.items(), strict=True):
    first = S - len(each)
    axes.imshow(each.isinf(), cmap='Greys', vmin=0, vmax=1.4, extent=(-0.5, S - 0.5, S - 0.5, first - 0.5))
    axes.set(title=name, xlabel='key: seen', ylabel='query: sees', xticks=range(S), yticks=range(first, S))
    axes.set_xticks([i - 0.5 for i in range(S)], minor=True)
    axes.set_yticks([i - 0.5 for i in range(first, S)], minor=True)
    axes.grid(which='minor', color='lightgrey', linewidth=0.5)
    axes.tick_params(which='both', length=0)
figure.suptitle('white: 0, may look    grey: -inf, may not')
show(figure)
# %% [markdown] lang=en
# ## The attention of model.py
#
# `CausalSelfAttention` has the same two linear layers: `c_attn` makes queries, keys and values, `c_proj` mixes the heads.
# We give it our weights. It calls a function of torch that fuses all these steps. It never stores the (T, T) weights, so it is faster
# and needs less memory; the numbers are equal up to rounding.
# %% [markdown] lang=zh
# ## model.py 里的注意力
#
# `CausalSelfAttention` 里也是这两个线性层：`c_attn` 算查询、键、值，`c_proj` 把各个头混合起来。
# 把我们的权重交给它。它调用 torch 的融合算子，不保存 (T, T) 的权重矩阵，所以更快也更省内存；
# 除了舍入误差，结果相等。
# %%
layer = CausalSelfAttention(GPTConfig(n_embd=C, n_head=H, block_size=T, vocab_size=10))
layer.c_attn.load_state_dict(qkv.state_dict())
layer.c_proj.load_state_dict(projection.state_dict())
from_model = layer(x, rotary=None, mask=None, slots=None)  # mask=None: causal
print('largest difference', (ours - from_model).abs().max().item())
assert torch.allclose(ours, from_model, atol=1e-6)
# %% [markdown] lang=en
# ## Watching attention work
#
# With random matrices the weights mean nothing. So let one head learn a task that needs looking things up. A row is a list
# of pairs, a letter with a digit, followed by three letters without one:
#
#     a3 e7 b1 d0 c5 f2   b?  f?  a?      answer: 1 2 3
#
# To answer `b?`, the token must find the token with the letter b, and fetch its digit. That is precisely query, key and
# value. The vector of a token is the sum of a learned vector for its letter and one for its digit.
#
# How the loop below learns is the subject of chapter 4. For now: the **loss** (损失) says how wrong the answers are, and each
# step changes the matrices a little so that it falls.
# %% [markdown] lang=zh
# ## 看注意力怎样工作
#
# 矩阵是随机的，权重就没有意义。所以我们让一个头去学一件必须“查找”的事。每一行先是几个字母和数字的搭配，
# 后面跟着三个没有数字的字母：
#
#     a3 e7 b1 d0 c5 f2   b?  f?  a?      答案：1 2 3
#
# 要回答 `b?`，就得找到字母是 b 的那个词元，取来它的数字。这不就是查询、键和值吗？
# 每个词元的向量，是字母的向量加上数字的向量，两者都是学出来的。
#
# 下面的循环怎样学习，第四章再讲。现在只需知道：**损失**（loss）表示答得有多差，每一步都把各个矩阵改一点点，让它变小。
# %%
N_PAIRS, N_QUERIES, WIDTH = 6, 3, 32
UNKNOWN = 10  # the digit of a token that asks


def make_rows(n_rows):
    letters = torch.rand(n_rows, N_PAIRS).argsort(dim=1)  # each letter once, in random order
    digits = torch.randint(10, (n_rows, N_PAIRS))
    asked = torch.rand(n_rows, N_PAIRS).argsort(dim=1)[:, :N_QUERIES]  # which pairs are asked for
    all_letters = torch.cat((letters, letters.gather(1, asked)), dim=1)
    all_digits = torch.cat((digits, torch.full_like(asked, UNKNOWN)), dim=1)
    return all_letters, all_digits, digits.gather(1, asked)


class Lookup(nn.Module):
    def __init__(self):
        super().__init__()
        # tables with a learned vector for each letter and each digit
        self.letter, self.digit = nn.Embedding(N_PAIRS, WIDTH), nn.Embedding(11, WIDTH)
        self.qkv, self.head = nn.Linear(WIDTH, 3 * WIDTH), nn.Linear(WIDTH, 10)

    def forward(self, letters, digits):
        x = self.letter(letters) + self.digit(digits)  # (B, T, C)
        q, k, v = self.qkv(x).chunk(3, dim=-1)
        mask = torch.full((x.size(1), x.size(1)), -math.inf).triu(1)
        weights = torch.softmax(q @ k.transpose(1, 2) / math.sqrt(WIDTH) + mask, dim=-1)  # (B, T, T)
        return self.head(weights @ v)[:, -N_QUERIES:], weights


lookup = Lookup()
optimizer = torch.optim.Adam(lookup.parameters(), lr=5e-3)
n_steps = 300
for step in range(n_steps + 1):
    letters, digits, answers = make_rows(128)
    logits, _ = lookup(letters, digits)
    loss = nn.functional.cross_entropy(logits.flatten(0, 1), answers.flatten())
    optimizer.zero_grad()
    loss.backward()
    optimizer.step()
    if step % 100 == 0:
        print(f'step {step}: loss {loss.item():.3f}')

letters, digits, answers = make_rows(500)
logits, weights = lookup(letters, digits)
accuracy = (logits.argmax(dim=-1) == answers).float().mean().item()
print(f'right answers: {accuracy:.0%}, by chance 10%')
assert accuracy > 0.9
# %%
names = ['abcdef'[i] + (str(j) if j < UNKNOWN else '?') for i, j in zip(letters[0].tolist(), digits[0].tolist(), strict=True)]
figure = picture(5.5, 4.6)
axes = figure.subplots()
shown = axes.imshow(weights[0].detach(), cmap='Blues', vmin=0, vmax=1)
axes.set_xticks(range(len(names)), names)
axes.set_yticks(range(len(names)), names)
axes.axhline(N_PAIRS - 0.5, color='grey', linewidth=0.8)
axes.set(xlabel='key: seen', ylabel='query: sees', title='attention weights')
figure.colorbar(shown)
show(figure)
# %% [markdown] lang=en
# Look at the last three rows: each query puts its weight on the token with its letter. The rows above are arbitrary, because no answer
# is asked of them. Nobody wrote a rule for looking up; it follows from the loss.
#
# ## Where to go on
#
# `CausalSelfAttention.forward` in `model.py` and `attention` in `kernels.py`. There you meet two things that this chapter left
# out: rotary positions, which turn queries and keys by an angle that depends on the place in the text, and fewer heads of keys and values
# than of queries (exercise 3). Our lookup needed no positions. A text does: without them, attention cannot tell "dog bites
# man" from "man bites dog", apart from the mask. Chapter 3 adds them.
# %% [markdown] lang=zh
# 看最后三行：每个提问的词元，都把权重放在了字母相同的那个词元上。上面几行没有人问，所以权重随意。
# 没有人写过“查找”的规则，它是为了降低损失自己长出来的。
#
# ## 接着读什么
#
# 读 `model.py` 里的 `CausalSelfAttention.forward` 和 `kernels.py` 里的 `attention`。那里有两样这一章没讲的东西：
# 一是旋转位置编码（rotary position），按词元在文中的位置把查询和键转一个角度；二是键和值的头可以比查询的头少（见练习 3）。
# 我们的查找任务不需要位置，可文本需要：没有位置，除了掩码带来的一点差别，注意力分不清“狗咬人”和“人咬狗”。第三章会加上位置。
# %% [markdown] lang=en
# ## Exercises
#
# 1. Change the last token of `x` and compare the outputs. Which rows of `layer(x, ...)` change, and why must it be so?
# 2. Shuffle the tokens 0 to 4 of `x` among themselves, and leave token 5 in its place. Does the output for token 5
#    change? What does that say about positions?
# 3. In **grouped-query attention** (分组查询注意力) several heads of queries share one head of keys and values, which saves
#    memory in the cache. Compute `kernels.attention` with 4 heads of queries and 2 of keys and values, and get the same by
#    repeating each head of keys and values.
#
# <details><summary>Solutions in words</summary>
#
# 1. Only the last row. In training, row t predicts token t + 1; if it depended on later tokens, it could copy the answer,
#    and in use, where there are no later tokens, it would be lost.
# 2. No (up to rounding). A weighted sum does not depend on the order of its terms. Attention sees a *set* of earlier
#    tokens, so order has to be put into the vectors.
# 3. Query heads 0 and 1 use head 0 of keys and values, query heads 2 and 3 use head 1: `repeat_interleave`.
#
# The next cells hold the code. They are folded in Jupyter.
# </details>
# %% [markdown] lang=zh
# ## 练习
#
# 1. 改动 `x` 的最后一个词元，比较输出。`layer(x, ...)` 的哪几行变了？为什么必须如此？
# 2. 把 `x` 的第 0 到 4 个词元打乱，第 5 个不动。第 5 个词元的输出变不变？这说明了什么？
# 3. 在**分组查询注意力**（grouped-query attention）里，几个查询头共用一个键值头，这样缓存更省内存。
#    用 4 个查询头、2 个键值头调用 `kernels.attention`，再用“把每个键值头重复一遍”的办法得到同样的结果。
#
# <details><summary>答案（文字）</summary>
#
# 1. 只有最后一行变。训练时第 t 行要预测第 t + 1 个词元；要是它能看到后面，就可以照抄答案，
#    而真正使用时后面什么都没有，它就不会了。
# 2. 不变（舍入误差除外）。加权和与各项的次序无关。注意力看到的是前面词元的一个**集合**，所以次序必须写进向量里。
# 3. 查询头 0、1 用键值头 0，查询头 2、3 用键值头 1：`repeat_interleave`。
#
# 代码在下面几格里，在 Jupyter 中是折叠的。
# </details>
# %% solution
changed = x.clone()
changed[:, -1] += 1
difference = (layer(changed, None, None, None) - from_model).abs().amax(dim=(0, 2))
print([f'{each:.3f}' for each in difference.tolist()])
assert difference[:-1].max() < 1e-6 and difference[-1] > 0.01
# %% solution
order = torch.tensor([3, 0, 4, 2, 1, 5])
difference = (layer(x[:, order], None, None, None) - from_model).abs().amax(dim=(0, 2))
print([f'{each:.3f}' for each in difference.tolist()])
assert difference[-1] < 1e-6
# %% solution
q, k, v = torch.randn(1, 4, T, D), torch.randn(1, 2, T, D), torch.randn(1, 2, T, D)
grouped = kernels.attention(q, k, v, None, 0.0)
repeated = kernels.attention(q, k.repeat_interleave(2, dim=1), v.repeat_interleave(2, dim=1), None, 0.0)
print('largest difference', (grouped - repeated).abs().max().item())
assert torch.allclose(grouped, repeated, atol=1e-6)
