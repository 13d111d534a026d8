# %% [markdown] lang=en
# # Chapter 3: a GPT from parts
#
# Attention lets tokens exchange information. A **GPT** (generative pretrained transformer, 生成式预训练 Transformer) wraps it in a few
# more parts, all of them simple. We build each part by hand, count the parameters of the 124M model with pencil and
# paper, put the parts together in 60 lines, and check that our model gives the same output as `model.py`.
#
# The path of a token through the model:
#
#     token ids (B, T)
#       -> embedding + positions         (B, T, C)      the residual stream begins
#       -> block 1: + attention, + MLP   (B, T, C)
#       -> ...
#       -> block L: + attention, + MLP   (B, T, C)
#       -> norm, head                    (B, T, V)      a score for every token that might come next
# %% [markdown] lang=zh
# # 第三章　用零件装一个 GPT
#
# 有了注意力，词元之间就能交换信息。**GPT**（generative pretrained transformer，生成式预训练 Transformer）不过是在它外面再加几个零件，
# 每个都很简单。这一章逐个手写这些零件，用纸笔算出 124M 模型的参数个数，再用 60 行代码把它们装起来，
# 最后验证：我们的模型和 `model.py` 的输出相同。
#
# 一个词元在模型里要走的路：
#
#     词元编号 (B, T)
#       -> 词嵌入 + 位置               (B, T, C)      残差流从这里开始
#       -> 第 1 块：+ 注意力，+ MLP    (B, T, C)
#       -> ……
#       -> 第 L 块：+ 注意力，+ MLP    (B, T, C)
#       -> 归一化，输出层              (B, T, V)      下一个词元的 V 个候选，各有一个分数
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
from torch.nn import functional as F

from lessons.helpers import COLOURS, picture, show
from model import GPT, GPTConfig

torch.manual_seed(0)
torch.set_printoptions(precision=2, sci_mode=False)
V, T, C, H, L = 50, 16, 32, 4, 3  # vocabulary, context, width, heads, layers of our small model
B = 2
# %% [markdown] lang=en
# ## Embedding: a table with a row for each token
#
# The **embedding** (词嵌入) is a matrix with V rows. Token number 7 gets row 7, and the rows are learned. This is the same
# as multiplying by a **one-hot** vector (独热向量: a 1 at place 7, zeros elsewhere), only without the multiplication.
#
# A second table has a row for each position, because attention by itself does not know the order (exercise 2 of chapter 2).
# The two rows are added.
# %% [markdown] lang=zh
# ## 词嵌入：每个词元一行
#
# **词嵌入**（embedding）是一个 V 行的矩阵。第 7 号词元就取第 7 行，行里的数是学出来的。
# 这和乘以一个**独热向量**（one-hot：第 7 位是 1，其余是 0）是一回事，只是省掉了乘法。
#
# 另有一张表，每个位置一行，因为注意力本身不知道次序（第二章练习 2）。取出来的两行相加。
# %%
table = nn.Embedding(V, C)
ids = torch.randint(V, (B, T))
one_hot = F.one_hot(ids, V).float()
print('ids', tuple(ids.shape), ' one-hot', tuple(one_hot.shape), ' vectors', tuple(table(ids).shape))
assert torch.allclose(one_hot @ table.weight, table(ids))

position_table = nn.Embedding(T, C)
x = table(ids) + position_table(torch.arange(T))  # (B, T, C): the positions are the same for each row
# %% [markdown] lang=en
# ## Norm: keep the numbers in range
#
# **Layer norm** (层归一化) takes each vector on its own: subtract the mean of its C numbers, divide by their standard deviation,
# then scale and shift each of the C places by learned numbers. So every part receives numbers of a similar size, no matter how
# deep in the model it is.
#
# In torch a part with parameters is an `nn.Module`; `nn.Parameter` marks numbers that are to be learned, and `norm(x)` calls
# `forward`.
# %% [markdown] lang=zh
# ## 归一化：让数的大小合适
#
# **层归一化**（layer norm）对每个向量单独做：减去这 C 个数的平均值，除以标准差，再在 C 个分量上各乘一个、各加一个学出来的数。
# 这样不管在模型的哪一层，每个零件收到的数大小都差不多。
#
# 在 torch 里，带参数的零件是一个 `nn.Module`；要学的数用 `nn.Parameter` 标出来；写 `norm(x)` 就会调用 `forward`。
# %%
class LayerNorm(nn.Module):
    def __init__(self, C):
        super().__init__()
        self.weight, self.bias = nn.Parameter(torch.ones(C)), nn.Parameter(torch.zeros(C))

    def forward(self, x):
        mean = x.mean(dim=-1, keepdim=True)
        variance = ((x - mean) ** 2).mean(dim=-1, keepdim=True)
        return (x - mean) / torch.sqrt(variance + 1e-5) * self.weight + self.bias  # 1e-5: no division by zero


norm = LayerNorm(C)
large = 100 * x + 7
print(f'before: mean {large.mean():.1f}, std {large.std():.1f}; after: {norm(large).mean():.1f}, {norm(large).std():.1f}')
assert torch.allclose(norm(large), F.layer_norm(large, (C,)), atol=1e-4)
# %% [markdown] lang=en
# ## MLP: each token thinks for itself
#
# Attention moves information between tokens. The **MLP** (multilayer perceptron, 多层感知机) then works on each vector alone: widen it from C to
# 4C numbers, bend them by a curve, and narrow it again. Without the curve, two matrices in a row would be no more than
# one matrix. GPT-2's curve is **GELU**, a smooth relative of `max(0, x)`, computed by a formula with tanh.
# %% [markdown] lang=zh
# ## MLP：每个词元自己想一想
#
# 注意力在词元之间搬运信息。**MLP**（multilayer perceptron，多层感知机）则对每个向量单独加工：从 C 维放宽到 4C 维，
# 经过一条弯的曲线，再收回到 C 维。没有这条曲线，两个矩阵连乘还是一个矩阵，等于没加。
# GPT-2 用的曲线叫 **GELU**，可以看成光滑版的 `max(0, x)`，用一个带 tanh 的公式来算。
# %%
def gelu(x):
    return 0.5 * x * (1 + torch.tanh(math.sqrt(2 / math.pi) * (x + 0.044715 * x ** 3)))


class MLP(nn.Module):
    def __init__(self, C):
        super().__init__()
        self.c_fc, self.c_proj = nn.Linear(C, 4 * C), nn.Linear(4 * C, C)

    def forward(self, x):
        return self.c_proj(gelu(self.c_fc(x)))


points = torch.linspace(-4, 4, 200)
assert torch.allclose(gelu(points), F.gelu(points, approximate='tanh'), atol=1e-6)
figure = picture(5, 2.8)
axes = figure.subplots()
axes.plot(points, gelu(points), color=COLOURS[0], label='GELU')
axes.plot(points, points.relu(), color=COLOURS[1], linestyle='--', label='max(0, x)')
axes.set(xlabel='x')
axes.grid(alpha=0.25)
axes.legend(frameon=False)
show(figure)
# %% [markdown] lang=en
# ## Block: add, do not replace
#
# A **block** (块) has attention and an MLP, each behind a norm. Its results are *added* to x:
#
#     x = x + attention(norm(x))
#     x = x + mlp(norm(x))
#
# This is the **residual connection** (残差连接). A block corrects x instead of replacing it. So the model never loses which token it has, and in training
# the gradient has a direct path along the plus signs back to the first layer.
#
# The attention is chapter 2's.
# %% [markdown] lang=zh
# ## 块：相加，而不是替换
#
# 一个**块**（block）里有一个注意力和一个 MLP，前面各有一个归一化。它们的结果**加**到 x 上：
#
#     x = x + attention(norm(x))
#     x = x + mlp(norm(x))
#
# 这叫**残差连接**（residual connection）。每一块只修正 x，而不是另造一个 x：词元原来是谁，一路上都不会丢；
# 训练时，梯度也可以沿着加号直接传回第一层。
#
# 注意力就是第二章的那个。
# %%
class Attention(nn.Module):
    def __init__(self, C, H):
        super().__init__()
        self.H = H
        self.c_attn, self.c_proj = nn.Linear(C, 3 * C), nn.Linear(C, C)

    def forward(self, x):
        B, T, C = x.shape
        q, k, v = self.c_attn(x).view(B, T, 3, self.H, C // self.H).permute(2, 0, 3, 1, 4)  # (B, H, T, D) each
        mask = torch.full((T, T), -math.inf).triu(1)
        weights = torch.softmax(q @ k.transpose(2, 3) / math.sqrt(C // self.H) + mask, dim=-1)
        return self.c_proj((weights @ v).transpose(1, 2).reshape(B, T, C))


class Block(nn.Module):
    def __init__(self, C, H):
        super().__init__()
        self.ln_1, self.attn = LayerNorm(C), Attention(C, H)
        self.ln_2, self.mlp = LayerNorm(C), MLP(C)

    def forward(self, x):
        x = x + self.attn(self.ln_1(x))
        return x + self.mlp(self.ln_2(x))


print(tuple(Block(C, H)(x).shape), '- same shape in and out, so blocks can be stacked')
# %% [markdown] lang=en
# How much do the plus signs matter? Stack 12 blocks with and without them, and measure how alike the vectors of
# different tokens are after each block, by the cosine of the angle between them: 1 means the same direction. Attention
# averages, so without the plus signs all tokens soon look alike, and later parts cannot tell them apart.
# %% [markdown] lang=zh
# 加号到底有多要紧？叠 12 个块，一次有加号，一次没有，看看每过一块，不同词元的向量有多像。
# 像不像用夹角的余弦来衡量：等于 1 就是方向完全相同。注意力是求平均，没有加号的话，所有词元很快变成一个样，
# 后面的零件再也分不出谁是谁。
# %%
def likeness(x):
    directions = F.normalize(x[0] - x[0].mean(dim=-1, keepdim=True), dim=-1)  # (T, C)
    cosines = directions @ directions.T  # (T, T)
    return ((cosines.sum() - T) / (T * T - T)).item()  # without each token's cosine with itself


@torch.no_grad()
def likeness_after_blocks(residual):
    torch.manual_seed(0)
    y, values = x, [likeness(x)]
    for _ in range(12):
        block = Block(C, H)
        if residual:
            y = block(y)
        else:
            y = block.attn(block.ln_1(y))
            y = block.mlp(block.ln_2(y))
        values.append(likeness(y))
    return values


figure = picture(6, 3)
axes = figure.subplots()
axes.plot(likeness_after_blocks(True), marker='o', color=COLOURS[0], label='x + f(x)')
axes.plot(likeness_after_blocks(False), marker='s', color=COLOURS[1], label='f(x)')
axes.set(xlabel='blocks passed', ylabel='mean cosine between tokens', ylim=(-0.1, 1.1))
axes.grid(alpha=0.25)
axes.legend(frameon=False)
show(figure)
# %% [markdown] lang=en
# ## Head: from a vector back to tokens
#
# The last vector of each token is compared with all V rows of a matrix by dot products, which gives V scores, the
# **logits**. Softmax turns them into probabilities for the next token. GPT-2 uses the embedding table itself for this, so that a token
# has one row for reading and writing: **tied weights** (权重共享).
#
# ## The whole model
#
# The parts have the names that `model.py` gives them, so that weights can be exchanged.
# %% [markdown] lang=zh
# ## 输出层：从向量回到词元
#
# 每个词元最后的向量，和一个矩阵的 V 行各做一次点积，得到 V 个分数，叫 **logits**。softmax 把它们变成下一个词元的概率。
# GPT-2 直接用词嵌入那张表来做这件事，读和写用同一行：这叫**权重共享**（tied weights）。
#
# ## 整个模型
#
# 各零件的名字和 `model.py` 里一样，这样权重可以互换。
# %%
class OurGPT(nn.Module):
    def __init__(self, V, T, C, H, L):
        super().__init__()
        self.transformer = nn.ModuleDict(dict(
            wte=nn.Embedding(V, C), wpe=nn.Embedding(T, C),  # word token, word position embedding
            h=nn.ModuleList(Block(C, H) for _ in range(L)), ln_f=LayerNorm(C)))
        self.lm_head = nn.Linear(C, V, bias=False)
        self.lm_head.weight = self.transformer.wte.weight  # tied

    def forward(self, ids):
        x = self.transformer.wte(ids) + self.transformer.wpe(torch.arange(ids.size(1)))
        for block in self.transformer.h:
            x = block(x)
        return self.lm_head(self.transformer.ln_f(x))


ours = OurGPT(V, T, C, H, L)
theirs = GPT(GPTConfig(vocab_size=V, block_size=T, n_embd=C, n_head=H, n_layer=L)).eval()
ours.load_state_dict(theirs.state_dict())
with torch.no_grad():
    our_logits = ours(ids)
    their_logits, _ = theirs(ids, targets=ids)
print('logits', tuple(our_logits.shape), ' largest difference', (our_logits - their_logits).abs().max().item())
assert torch.allclose(our_logits, their_logits, atol=1e-5)
# %% [markdown] lang=en
# Equal. You have written a GPT.
#
# ## Counting to 124 million
#
# GPT-2 (small) has V = 50257, T = 1024, C = 768, L = 12. A linear layer from n to m numbers has n·m weights and m biases.
#
# | part | parameters | |
# | --- | --- | --- |
# | embedding | V·C | 38,597,376 |
# | positions | T·C | 786,432 |
# | in each block: two norms | 2·2C | 3,072 |
# | attention, q k v | C·3C + 3C | 1,771,776 |
# | attention, projection | C·C + C | 590,592 |
# | MLP, widen | C·4C + 4C | 2,362,368 |
# | MLP, narrow | 4C·C + C | 2,360,064 |
# | a block | 12C² + 13C | 7,087,872 |
# | last norm | 2C | 1,536 |
# | head | tied: none of its own | 0 |
#
# Check a row or two yourself before running the cell. `torch.device('meta')` makes a model without memory for its numbers.
# %% [markdown] lang=zh
# 相等。你已经写出了一个 GPT。
#
# ## 数到一亿两千四百万
#
# GPT-2（小号）的 V = 50257，T = 1024，C = 768，L = 12。从 n 维到 m 维的线性层有 n·m 个权重和 m 个偏置。
#
# | 零件 | 参数个数 | |
# | --- | --- | --- |
# | 词嵌入 | V·C | 38,597,376 |
# | 位置 | T·C | 786,432 |
# | 每一块里：两个归一化 | 2·2C | 3,072 |
# | 注意力，q k v | C·3C + 3C | 1,771,776 |
# | 注意力，混合各头 | C·C + C | 590,592 |
# | MLP，放宽 | C·4C + 4C | 2,362,368 |
# | MLP，收窄 | 4C·C + C | 2,360,064 |
# | 一块合计 | 12C² + 13C | 7,087,872 |
# | 最后的归一化 | 2C | 1,536 |
# | 输出层 | 共享，没有自己的 | 0 |
#
# 运行之前，先自己验算一两行。`torch.device('meta')` 造出来的模型不给参数分配内存。
# %%
def count(V, T, C, L):
    block = 12 * C * C + 13 * C
    return V * C + T * C + L * block + 2 * C


by_hand = count(V=50257, T=1024, C=768, L=12)
with torch.device('meta'):
    gpt2 = GPT(GPTConfig(vocab_size=50257, block_size=1024, n_embd=768, n_head=12, n_layer=12))
print(f'{by_hand:,} by hand, {gpt2.get_num_params(non_embedding=False):,} in model.py')
assert by_hand == gpt2.get_num_params(non_embedding=False) == 124_439_808
# %% [markdown] lang=en
# Where are the parameters of the four GPT-2 models? In the small one nearly a third belongs to the embedding. In the larger ones
# the MLPs have nearly two thirds.
# %% [markdown] lang=zh
# 四种大小的 GPT-2，参数都花在哪里？小号有将近三分之一是词嵌入；模型变大以后，将近三分之二在 MLP 里。
# %%
models = {'small': (12, 768), 'medium': (24, 1024), 'large': (36, 1280), 'XL': (48, 1600)}
names, shares = [], []
for name, (n_layer, width) in models.items():
    total = count(50257, 1024, width, n_layer)
    attention, mlp = n_layer * (4 * width ** 2 + 4 * width), n_layer * (8 * width ** 2 + 5 * width)
    shares.append([(total - attention - mlp) / total, attention / total, mlp / total])
    names.append(f'{name}: {total / 1e6:,.0f}M')
figure = picture(7, 2.8)
axes = figure.subplots()
left = [0.0] * len(models)
for part, colour, values in zip(['embedding, norms', 'attention', 'MLP'], COLOURS, zip(*shares, strict=True), strict=False):
    axes.barh(names, values, left=left, color=colour, label=part)
    left = [a + b for a, b in zip(left, values, strict=True)]
axes.set(xlabel='share of the parameters', xlim=(0, 1))
axes.invert_yaxis()
figure.legend(loc='outside upper center', ncols=3, frameon=False)
show(figure)
# %% [markdown] lang=en
# ## Before training
#
# An untrained model has no opinion: all V tokens get nearly the same probability, 1/V. The **loss** (损失) of the next chapter is
# minus the logarithm of the probability that the model gives to the right token, so it begins near ln V. A larger first loss is a sign of a mistake.
# %% [markdown] lang=zh
# ## 训练之前
#
# 没训练过的模型什么都不知道：V 个词元的概率几乎都是 1/V。下一章要讲的**损失**（loss），是模型给正确词元的概率取对数再加负号，
# 所以一开始应当在 ln V 附近。如果第一步的损失比这大得多，多半哪里写错了。
# %%
probabilities = torch.softmax(our_logits, dim=-1)
targets = torch.randint(V, (B, T))
loss = F.cross_entropy(our_logits.flatten(0, 1), targets.flatten())
print(f'probabilities from {probabilities.min():.4f} to {probabilities.max():.4f}, 1/V = {1 / V:.4f}')
print(f'loss {loss:.2f}, ln V = {math.log(V):.2f}')
assert abs(loss.item() - math.log(V)) < 0.2
# %% [markdown] lang=en
# ## Where to go on
#
# Read `model.py` from `class Block` to `GPT.head`. You know every line of the `gpt2` path now. The other two presets change
# single parts: `modern` and `llama` replace the position table by rotary positions, layer norm by RMSNorm (no mean, no shift), and
# GELU by other curves. The table at the top of the file says which.
# %% [markdown] lang=zh
# ## 接着读什么
#
# 读 `model.py`，从 `class Block` 到 `GPT.head`。`gpt2` 这条路上的每一行你都认得了。
# 另外两种预设只换个别零件：`modern` 和 `llama` 用旋转位置代替位置表，用 RMSNorm（不减平均值，也不加偏移）代替层归一化，曲线也不是 GELU。
# 文件开头有说明。
# %% [markdown] lang=en
# ## Exercises
#
# 1. Compute the number of parameters of GPT-2 XL by hand (L = 48, C = 1600) and check it against `model.py`. It has 25 heads: why do
#    they not appear in the formula?
# 2. Training with AdamW keeps for each parameter the weight, its gradient and two running means, 4 bytes each. How much memory
#    does the 124M model need for that? Training takes roughly 6 floating-point operations per parameter and token: how long do 300 billion
#    tokens take at 10¹⁴ operations a second?
# 3. Remove the position table from our model (set it to zero) and exchange tokens 0 and 1 of the input. Do the logits of token 15
#    change in a model of one layer? And of three?
#
# <details><summary>Solutions in words</summary>
#
# 1. 1,557,611,200. The heads only divide the C numbers among themselves; the matrices stay the same.
# 2. 124.4 million times 16 bytes = 2.0 GB, and the activations come on top. 6 · 124.4·10⁶ · 300·10⁹ = 2.2·10²⁰ operations,
#    about 26 days on one such machine, or a little over 3 days on eight.
# 3. With one layer they do not change: token 15 sees a set. With three they do, because the mask lets token 1 see token 0
#    and not the other way round, so the vectors of both know a bit about their order. A causal model can learn order even without positions,
#    but it is harder.
#
# The next cells hold the code. They are folded in Jupyter.
# </details>
# %% [markdown] lang=zh
# ## 练习
#
# 1. 手算 GPT-2 XL 的参数个数（L = 48，C = 1600），再用 `model.py` 核对。它有 25 个头，为什么公式里没有头数？
# 2. 用 AdamW 训练时，每个参数要存权重、梯度和两个滑动平均，各 4 字节。124M 的模型为此要多少内存？
#    另外，每个参数、每个词元大约要 6 次浮点运算：每秒 10¹⁴ 次的机器，训练 3000 亿个词元要多久？
# 3. 去掉我们模型里的位置表（全部置零），交换输入里第 0、1 两个词元。只有一层时，第 15 个词元的 logits 变不变？三层呢？
#
# <details><summary>答案（文字）</summary>
#
# 1. 1,557,611,200。头只是把 C 个数分成几份，矩阵的大小不变。
# 2. 1.244 亿 × 16 字节 = 2.0 GB，激活值还要另算。6 × 1.244×10⁸ × 3×10¹¹ = 2.2×10²⁰ 次运算，
#    一台这样的机器约 26 天，八台三天多一点。
# 3. 一层时不变：第 15 个词元看到的是一个集合。三层时会变：掩码让第 1 个词元看得见第 0 个，反过来却不行，
#    所以它们的向量里已经带了一点次序的信息。因果模型即使没有位置也能学会次序，只是更难。
#
# 代码在下面几格里，在 Jupyter 中是折叠的。
# </details>
# %% solution
with torch.device('meta'):
    xl = GPT(GPTConfig(vocab_size=50257, block_size=1024, n_embd=1600, n_head=25, n_layer=48))
print(f'{count(50257, 1024, 1600, 48):,}')
assert count(50257, 1024, 1600, 48) == xl.get_num_params(non_embedding=False)
# %% solution
print(f'{by_hand * 16 / 1e9:.1f} GB, {6 * by_hand * 300e9 / 1e14 / 86400:.0f} days')
# %% solution
swapped = ids.clone()
swapped[:, [0, 1]] = ids[:, [1, 0]]
for n_layer in (1, 3):
    torch.manual_seed(0)
    model = OurGPT(V, T, C, H, n_layer)
    nn.init.zeros_(model.transformer.wpe.weight)
    with torch.no_grad():
        print(f'L = {n_layer}: {(model(ids) - model(swapped))[:, -1].abs().max():.4f}')
