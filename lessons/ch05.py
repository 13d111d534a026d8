# %% [markdown] lang=en
# # Chapter 5: how good is it?
#
# Chapter 4 ended with a loss. Is it a good one? A loss alone cannot be judged: it depends on the tokenizer and on how
# predictable the text is. This chapter measures a model in ways that can be compared: **bits per byte** (每字节比特数),
# samples drawn in different ways, and a **benchmark** (基准测试). It also shows why generating text is fast.
#
# The trick of this chapter: we make a text whose unpredictability we know exactly. So we know what the best possible model
# would reach.
# %% [markdown] lang=zh
# # 第五章　模型有多好？
#
# 第四章结束时得到了一个损失值。它算好吗？单看损失说不准：它取决于分词器，也取决于文本本身有多好猜。
# 这一章用几种可以互相比较的办法来衡量模型：**每字节比特数**（bits per byte，bpb）、不同方式抽出来的样例，
# 以及**基准测试**（benchmark）。顺便看看生成文本为什么可以很快。
#
# 本章有个窍门：文本由我们自己造，它有多难猜，我们算得一清二楚。于是最好的模型能做到多好，也就知道了。
# %%
import json
import math
import os
import random
import shutil
import sys
import time
from collections import Counter
from pathlib import Path

# notebooks start in their own folder: go up to the repository's
os.chdir(next(folder for folder in (Path.cwd(), *Path.cwd().parents) if (folder / 'model.py').exists()))
sys.path.insert(0, '')

import numpy as np
import torch

import kernels
from lessons.helpers import COLOURS, SMALL, WORK, labels, picture, run, show
from model import GPT, GPTConfig
from tokens.loader import Loader
from weights.begin import build_model, find_start

HERE = WORK / 'ch05'
shutil.rmtree(HERE, ignore_errors=True)  # of an earlier run
HERE.mkdir(parents=True)
# %% [markdown] lang=en
# ## A text of known surprise
#
# Each line says who eats what, where and when, in Chinese or in English, one of the two by the toss of a coin. Time, place
# and person are drawn evenly. The food is not: everybody takes their favourite dish in half of the cases, the second in a
# quarter, and the other two in an eighth each.
# %% [markdown] lang=zh
# ## 一篇“意外程度”已知的文本
#
# 每一行说的是：什么时候，谁，在哪里，吃什么。用中文还是英文写，抛硬币决定。时间、地点、人物都是均匀抽取的，
# 食物不是：每个人一半的时候吃自己最爱的，四分之一的时候吃第二爱吃的，另外两样各占八分之一。
# %%
TIMES = [('清晨', 'At dawn'), ('中午', 'At noon'), ('傍晚', 'At dusk'), ('夜里', 'At night')]
PLACES = [('桥头', 'on the bridge'), ('山上', 'on the hill'), ('船里', 'in the boat'), ('河边', 'by the river')]
PEOPLE = [('老船工', 'the boatman'), ('小姑娘', 'the little girl'), ('邮递员', 'the postman'), ('木匠', 'the carpenter')]
FOODS = [('面条', 'noodles'), ('米饭', 'rice'), ('饺子', 'dumplings'), ('红薯', 'sweet potatoes')]
CHANCES = [1 / 2, 1 / 4, 1 / 8, 1 / 8]


def menu(person):
    """Return the foods of a person, the favourite one first."""
    return FOODS[person:] + FOODS[:person]


def sentence(when, where, who, food, language):
    if language == 0:
        return f'{when[0]}，{who[0]}在{where[0]}吃{food[0]}。'
    return f'{when[1]}, {where[1]}, {who[1]} eats {food[1]}.'


def draw_sentence(draw):
    person = draw.randrange(4)
    food = draw.choices(menu(person), CHANCES)[0]
    return sentence(draw.choice(TIMES), draw.choice(PLACES), PEOPLE[person], food, draw.randrange(2))


draw = random.Random(5)
lines = [draw_sentence(draw) for _ in range(1500 if SMALL else 6000)]
(HERE / 'text.txt').write_text('\n'.join(lines) + '\n', encoding='utf-8')
print('\n'.join(lines[:4]))
# %% [markdown] lang=en
# How surprising is a line? An event of probability $p$ carries $-\log_2 p$ **bits** (比特): a coin toss carries 1, one of
# four equal cases 2. The average over all cases is the **entropy** (熵). For a line we add up: language 1, time 2, place 2,
# person 2, and the food
#
# $$\tfrac12\cdot1+\tfrac14\cdot2+\tfrac18\cdot3+\tfrac18\cdot3=1.75 .$$
#
# Together 8.75 bits; everything else in the line is forced. Divided by the bytes of a line this is the lower bound: **no model in
# the world gets below it** on new lines of this text.
# %% [markdown] lang=zh
# 一行文字有多出人意料？概率为 $p$ 的事件带有 $-\log_2 p$ **比特**（bit）的信息：抛一次硬币是 1 比特，四种等可能的情形是 2 比特。
# 对所有情形取平均，就是**熵**（entropy）。一行的熵逐项相加：语言 1，时间 2，地点 2，人物 2，食物则是
#
# $$\tfrac12\cdot1+\tfrac14\cdot2+\tfrac18\cdot3+\tfrac18\cdot3=1.75 .$$
#
# 一共 8.75 比特，其余的字都是确定的。再除以一行的平均字节数，就得到下界：在这种文本的新句子上，
# **世界上没有哪个模型能比它更低**。
# %%
entropy = 1 + 2 + 2 + 2 + sum(-chance * math.log2(chance) for chance in CHANCES)
bytes_per_line = sum(len(line.encode('utf-8')) + 1 for line in lines) / len(lines)  # + 1 for the line end
bound = entropy / bytes_per_line
print(f'{entropy} bits a line, {bytes_per_line:.1f} bytes a line: at least {bound:.4f} bits per byte')
# %% [markdown] lang=en
# ## Two models that cannot be compared by their loss
#
# One model reads characters, the other one bytes. Size and number of steps are the same.
# %% [markdown] lang=zh
# ## 两个不能直接比损失的模型
#
# 一个模型按字读，另一个按字节读，大小和训练步数都一样。
# %%
N_ITERS = 80 if SMALL else 400
SHAPE = ['--block_size=128', '--n_layer=2', '--n_head=2', '--n_embd=64']
for name in ('char', 'byte'):
    run('data/text/prepare.py', '--input', HERE / 'text.txt', f'--tokenizer={name}', f'--out={HERE}/{name}',
        '--val_fraction=0.1', n_lines=2)
    run('train.py', 'config/quickstart.py', f'--dataset={HERE}/{name}', f'--out_dir={HERE}/out-{name}', *SHAPE,
        f'--max_iters={N_ITERS}', f'--eval_interval={N_ITERS}', '--report=False', n_lines=2)
# %% [markdown] lang=en
# The losses are far apart: a byte is easier to guess than a character, but there are more of them. To compare, ask for the
# surprise of the *same text*: add up the loss over all tokens, turn nats (奈特, natural logarithm) into bits by dividing by
# $\ln 2$, and divide by the number of bytes, which no tokenizer changes:
#
# $$\text{bits per byte}=\frac{\text{sum of the losses}}{\ln 2\cdot\text{bytes}} .$$
# %% [markdown] lang=zh
# 两个损失差得很远：字节比字好猜，但是个数更多。要比较，就得问**同一段文本**一共有多出人意料：
# 把所有词元的损失加起来，除以 $\ln 2$，从奈特（nat，自然对数的单位）换成比特，再除以字节数——字节数和分词器无关：
#
# $$\text{每字节比特数}=\frac{\text{损失之和}}{\ln 2\cdot\text{字节数}} .$$
# %%
def load(name):
    start = find_start(out_dir=f'{HERE}/out-{name}')
    return build_model(start), start.tokenizer


@torch.no_grad()
def measure(model, tokenizer, folder):
    """Return the mean loss and the bits per byte on the validation text, by hand."""
    loader = Loader(folder, 'val', block_size=128, batch_size=8, order='sequential')
    token_bytes = torch.tensor([len(tokenizer.decode_bytes([i])) for i in range(tokenizer.vocab_size)])
    nats, n_targets, n_bytes = 0.0, 0, 0
    for number in range(loader.n_windows):
        batch = loader.windows(np.array([number]))
        is_target = batch.y != kernels.IGNORE
        logits, _ = model(batch.x, batch.y)  # (1, T, V)
        log_p = logits.log_softmax(dim=-1)[is_target]  # (N, V)
        targets = batch.y[is_target]  # (N,)
        nats -= log_p.gather(1, targets[:, None]).sum().item()
        n_targets += len(targets)
        n_bytes += token_bytes[targets].sum().item()
    return nats / n_targets, nats / math.log(2) / n_bytes


models = {name: load(name) for name in ('char', 'byte')}
by_hand, by_program = {}, {}
for name, (model, tokenizer) in models.items():
    by_hand[name] = measure(model, tokenizer, f'{HERE}/{name}')
    run('evaluate.py', f'--out_dir={HERE}/out-{name}', '--tasks=bpb', '--dtype=float32', n_lines=2)
    by_program[name] = json.loads((HERE / f'out-{name}/eval.json').read_text())['results']['bpb']
    print(f'{name}: loss {by_hand[name][0]:.4f}, {by_hand[name][1]:.4f} bits per byte, the bound is {bound:.4f}')
    assert abs(by_hand[name][1] - by_program[name]['bpb']) < 1e-3
# %%
figure = picture(8, 2.8)
left, right = figure.subplots(1, 2)
for axes, column, title in ((left, 0, 'loss (nats per token)'), (right, 1, 'bits per byte')):
    bars = axes.bar(['characters', 'bytes'], [by_hand[name][column] for name in models], color=COLOURS[:2], width=0.5)
    axes.bar_label(bars, fmt='%.3f')
    axes.set_ylabel(title)
    axes.margins(y=0.25)
right.axhline(bound, color='black', linestyle='--', label='entropy of the text')
right.legend(frameon=False, loc='upper center', fontsize=8)
show(figure)
# %% [markdown] lang=en
# On the left the models look very different, on the right nearly the same, and both are close to the bound. What still
# separates them from it: windows begin in the middle of a line, where less is known, and training was short.
#
# ## What the model believes
#
# A model gives each possible next token a probability: a **distribution** (概率分布). Take the model of characters, give it a
# line up to 吃 (eats): "At dawn, on the bridge, the boatman eats". Each food begins with a different character (面 noodles, 米 rice,
# 饺 dumplings, 红 sweet potatoes), so the next character decides. The true chances are those of the boatman's menu.
# %% [markdown] lang=zh
# 左图上两个模型差别很大，右图上几乎一样，而且都接近下界。剩下的差距有两个原因：
# 评测窗口从一行的中间开始，那里能依据的上文少；训练的时间也短。
#
# ## 模型心里的概率
#
# 模型给每个可能的下一个词元一个概率，合起来就是一个**概率分布**（distribution）。我们给按字的模型一句话的前半截，
# 到“吃”字为止，看它给出的概率和真实概率差多少。四种食物的第一个字各不相同，所以下一个字就决定了吃什么。
# %%
model, tokenizer = models['char']


@torch.no_grad()
def next_logits(text):
    logits, _ = model(torch.tensor([tokenizer.encode(text)]))
    return logits[0, -1]  # (V,)


prompt = '清晨，老船工在桥头吃'
logits = next_logits('\n' + prompt)
believed = logits.softmax(dim=-1)
first = [food[0][0] for food in menu(0)]  # the first character of each food
chosen = [tokenizer.encode(character)[0] for character in first]
for character, i, truth in zip(first, chosen, CHANCES, strict=True):
    print(f'{character}: believed {believed[i]:.3f}, true {truth:.3f}')
print(f'all other {tokenizer.vocab_size - 4} characters together: {1 - believed[chosen].sum():.4f}')
assert believed[chosen].sum() > 0.5
# %% [markdown] lang=en
# ## Temperature, top_k, top_p
#
# To write text, draw the next token from the distribution, add it, and repeat. Three settings change the distribution before
# the draw:
#
# - **temperature** (温度) $T$: divide the logits (the numbers before softmax) by $T$. Below 1 the large probabilities
#   grow; above 1 all become more equal. 0 means: always take the largest.
# - **top_k**: keep the $k$ most likely tokens.
# - **top_p**: keep the fewest tokens whose probabilities add up to at least $p$. Where the model is sure, this is one token;
#   where it is not, many.
# %% [markdown] lang=zh
# ## temperature、top_k、top_p
#
# 写文本的办法是：按分布抽下一个词元，接上去，再抽。抽之前可以用三种设置来改变分布：
#
# - **温度**（temperature）$T$：先把 logits（softmax 之前的数）除以 $T$。小于 1 时，大的概率更大；大于 1 时，各种可能更接近。
#   0 表示总取概率最大的那个。
# - **top_k**：只留概率最大的 $k$ 个词元。
# - **top_p**：从大到小取，概率加起来一够 $p$ 就停。模型有把握时只剩一个词元，没把握时会留下很多。
# %%
def reshape(logits, temperature=1.0, top_k=None, top_p=None):
    """Return the probabilities (V,) from which the next token is drawn."""
    p = (logits / temperature).softmax(dim=-1)
    order = p.argsort(descending=True).tolist()
    kept = order[:top_k]
    if top_p is not None:
        total, n_kept = 0.0, 0
        while n_kept < len(kept) and total < top_p:
            total += p[kept[n_kept]].item()
            n_kept += 1
        kept = kept[:n_kept]
    result = torch.zeros_like(p)
    result[kept] = p[kept]
    return result / result.sum()


settings = {
    'T = 1': dict(),
    'T = 0.5': dict(temperature=0.5),
    'T = 2': dict(temperature=2.0),
    'top_k = 2': dict(top_k=2),
    'top_p = 0.7': dict(top_p=0.7),
}
torch.manual_seed(0)
for title, setting in settings.items():
    p = reshape(logits, **setting)
    complete = dict(temperature=1.0, top_k=None, top_p=None) | setting
    drawn = kernels.draw(logits.expand(20_000, -1), **complete)  # what sample.py calls
    frequency = torch.bincount(drawn, minlength=len(p)) / len(drawn)
    assert (frequency - p).abs().max() < 0.02
    print(f'{title:12}', ' '.join(f'{character} {p[i]:.2f}' for character, i in zip(first, chosen, strict=True)))
# %%
figure = picture(9, 2.6)
for axes, (title, setting) in zip(figure.subplots(1, len(settings), sharey=True), settings.items(), strict=True):
    p = reshape(logits, **setting)
    axes.bar(labels(first) + ['rest'], [*p[chosen].tolist(), 1 - p[chosen].sum().item()], color=COLOURS[0])
    axes.set_title(title, fontsize=10)
figure.supylabel('probability', fontsize=10)
show(figure)
# %% [markdown] lang=en
# 20,000 draws of `kernels.draw`, the function behind `sample.py`, agree with our probabilities.
#
# Which temperature should one take? We can test it, since we know which lines are correct. Draw many lines at each temperature,
# count the correct ones, and count how many of them are different.
# %% [markdown] lang=zh
# 我们用 `kernels.draw`（也就是 `sample.py` 里用的函数）抽了两万次，频率和算出来的概率相符。
#
# 那么温度该取多少？我们知道哪些句子是对的，所以可以做实验：在每个温度下写许多句，数一数有多少句是对的，又有多少句互不相同。
# %%
correct_lines = {sentence(when, where, who, food, language)
                 for when in TIMES for where in PLACES for who in PEOPLE for food in FOODS for language in (0, 1)}
print(f'{len(correct_lines)} correct lines are possible')
N_DRAWN = 16 if SMALL else 200
temperatures = [0.0, 0.3, 0.6, 1.0, 1.5, 2.0]
shares_correct, shares_different = [], []
start = torch.tensor([tokenizer.encode('\n')]).repeat(N_DRAWN, 1)
torch.manual_seed(1)
for temperature in temperatures:
    rows = model.generate(start, 70, temperature=temperature, vocab_size=tokenizer.vocab_size)
    texts = [tokenizer.decode(row[1:].tolist()).split('\n')[0] for row in rows]
    shares_correct.append(sum(text in correct_lines for text in texts) / N_DRAWN)
    shares_different.append(len(set(texts) & correct_lines) / N_DRAWN)
    print(f'T = {temperature}: {texts[0]}')

figure = picture(6, 3)
axes = figure.subplots()
axes.plot(temperatures, shares_correct, marker='o', color=COLOURS[0], label='correct')
axes.plot(temperatures, shares_different, marker='s', color=COLOURS[1], label='correct and different')
axes.set(xlabel='temperature', ylabel='share of the lines drawn', ylim=(0, 1.05))
axes.legend(frameon=False)
show(figure)
# %% [markdown] lang=en
# At 0 all lines are the same one. When the temperature rises, the lines vary, and from some point on more of them go wrong. One
# wants the range in between; 0.6 to 1 is usual. On the command line:
# %% [markdown] lang=zh
# 温度为 0 时，每次写出的都是同一句。温度升高，句子多样起来，错的也多起来。要的是中间那一段，通常取 0.6 到 1。在命令行里这样写：
# %%
output = run('sample.py', f'--out_dir={HERE}/out-char', '--start=夜里，', '--num_samples=2', '--max_new_tokens=40',
             '--temperature=0.7', '--top_p=0.9', '--seed=1')
assert output.count('夜里，') >= 2
# %% [markdown] lang=en
# ## Why generating is fast: the KV cache
#
# To write token number 500, the model needs the keys and values (chapter 2) of the 499 before it. They do not change when a token
# is added. So they are kept: the **KV cache** (键值缓存). Each new token then goes through the network alone.
#
# We time a larger model with random weights; for the time it does not matter what it writes.
# %% [markdown] lang=zh
# ## 生成为什么可以很快：键值缓存
#
# 要写第 500 个词元，模型需要前面 499 个词元的键和值（第二章）。而再添一个词元，它们并不会变，所以可以存起来，
# 这就是**键值缓存**（KV cache）。这样每个新词元只需要单独过一遍网络。
#
# 计时用一个大一些的模型，权重是随机的：写出什么内容不影响用时。
# %%
torch.manual_seed(2)
n_tokens = 100 if SMALL else 400
big = GPT(GPTConfig(block_size=512, vocab_size=512, n_layer=4, n_head=4, n_embd=128 if SMALL else 256)).eval()
first_token = torch.tensor([[1]])


@torch.inference_mode()
def without_cache(model, idx, n_tokens):
    """Read the whole row again for every token."""
    seconds = []
    for _ in range(n_tokens):
        started_s = time.perf_counter()
        logits, _ = model(idx)
        idx = torch.cat((idx, logits[:, -1].argmax(dim=-1, keepdim=True)), dim=1)
        seconds.append(time.perf_counter() - started_s)
    return idx, seconds


def with_cache(model, idx, n_tokens):
    seconds, started_s = [], time.perf_counter()
    for next_id in model.stream(idx, n_tokens, temperature=0):
        idx = torch.cat((idx, next_id[:, None]), dim=1)
        seconds.append(time.perf_counter() - started_s)
        started_s = time.perf_counter()
    return idx, seconds


slow_ids, slow_s = without_cache(big, first_token, n_tokens)
fast_ids, fast_s = with_cache(big, first_token, n_tokens)
assert torch.equal(slow_ids, fast_ids)
print(f'{n_tokens} tokens: {sum(slow_s):.2f} s without a cache, {sum(fast_s):.2f} s with one; the same tokens')
# %%
figure = picture(6, 3)
axes = figure.subplots()
for number, (title, seconds) in enumerate([('without cache', slow_s), ('with cache', fast_s)]):
    in_ms = [1000 * float(np.median(seconds[i:i + 10])) for i in range(0, n_tokens, 10)]
    axes.plot(range(0, n_tokens, 10), in_ms, label=title, color=COLOURS[number])
axes.set(xlabel='tokens in the row', ylabel='milliseconds per token', ylim=(0, None))
axes.legend(frameon=False)
show(figure)
# %% [markdown] lang=en
# Without a cache each token costs more than the one before it; with the cache the cost hardly grows.
#
# ## A benchmark, item by item
#
# Benchmarks for language models are mostly **multiple choice** (选择题). But a model of text does not tick boxes. Instead, one puts
# each choice after the question, adds up the logarithms of the probabilities of its tokens (the **log-likelihood**, 对数似然),
# and takes the choice with the largest sum.
#
# Our own items ask for the favourite dish, in the format of OpenBookQA. `evaluate.py` reads them from a folder.
# %% [markdown] lang=zh
# 没有缓存时，词元一个比一个慢；有了缓存，用时几乎不增长。
#
# ## 基准测试：一题一题地看
#
# 语言模型的基准测试大多是**选择题**（multiple choice）。可是语言模型不会打勾。办法是把每个选项接在题目后面，
# 将选项各词元概率的对数加起来，得到**对数似然**（log-likelihood），哪个选项的和最大，就算选了哪个。
#
# 我们自己出题，问每个人最爱吃什么，格式同 OpenBookQA。`evaluate.py` 从文件夹里读题。
# %%
items = []
for when in TIMES:
    for where in PLACES:
        for person, who in enumerate(PEOPLE):
            stem = f'{when[1]}, {where[1]}, {who[1]} eats'
            choices = {'text': [f'{food[1]}.' for food in FOODS], 'label': ['A', 'B', 'C', 'D']}
            items.append({'question_stem': stem, 'choices': choices, 'answerKey': 'ABCD'[person]})
(HERE / 'items').mkdir()
(HERE / 'items/openbookqa.jsonl').write_text('\n'.join(map(json.dumps, items)) + '\n', encoding='utf-8')
print(items[0])
# %%
@torch.no_grad()
def log_likelihood(context, continuation):
    """Return the log-probability of a continuation after a context, in nats."""
    before, whole = tokenizer.encode(context), tokenizer.encode(context + continuation)
    logits, _ = model(torch.tensor([whole[:-1]]), torch.tensor([whole[1:]]))
    log_p = logits[0].log_softmax(dim=-1)  # (T, V)
    positions = range(len(before) - 1, len(whole) - 1)  # position i predicts token i + 1
    return sum(log_p[i, whole[i + 1]].item() for i in positions)


item = items[0]
print(item['question_stem'], '...')
for text in item['choices']['text']:
    score = log_likelihood(item['question_stem'], ' ' + text)
    print(f'    {text:16} {score:7.3f} nats in all, {score / len(text):7.3f} per character')
# %% [markdown] lang=en
# Each further token can only lower the sum, so long choices are at a disadvantage. `acc_norm` therefore divides by the
# number of characters. Which of the two is fairer depends on the benchmark; reports give both. Now all items, by hand and by
# `evaluate.py`:
# %% [markdown] lang=zh
# 每多一个词元，总和只会更小，所以长的选项吃亏。`acc_norm` 因此再除以字符数。哪一种更公平，要看是什么题，报告里通常两个都给。
# 现在把全部题目做一遍：亲手算一次，再用 `evaluate.py` 算一次。
# %%
hits = {'acc': 0, 'acc_norm': 0}
for item in items:
    texts, gold = item['choices']['text'], 'ABCD'.index(item['answerKey'])
    scores = [log_likelihood(item['question_stem'], ' ' + text) for text in texts]
    per_character = [score / len(text) for score, text in zip(scores, texts, strict=True)]
    hits['acc'] += int(np.argmax(scores)) == gold
    hits['acc_norm'] += int(np.argmax(per_character)) == gold
by_hand = {name: n / len(items) for name, n in hits.items()}

run('evaluate.py', f'--out_dir={HERE}/out-char', '--tasks=openbookqa', f'--eval_dir={HERE}/items', '--dtype=float32', n_lines=2)
by_program = json.loads((HERE / 'out-char/eval.json').read_text())['results']['openbookqa']
print('by hand:    ', by_hand)
print('evaluate.py:', {name: by_program[name] for name in by_hand})
assert by_hand == {name: by_program[name] for name in by_hand}
# %% [markdown] lang=en
# The two agree. Guessing would give 0.25. All answers are right by `acc`, but not by `acc_norm`: the girl's favourite, rice, is a
# short word, and per character the long words "sweet potatoes" overtake it. With few items an accuracy is itself uncertain, so `evaluate.py` prints a
# standard error (标准误差, the number after ±). Differences smaller than about twice that number may be chance.
#
# ## Where to go on
#
# `training/scoring.py` has the bits per byte and the log-likelihoods, `tasks/items.py` the benchmarks,
# `kernels.draw` the sampling, `GPT.stream` in `model.py` the loop with the cache.
# %% [markdown] lang=zh
# 两边相等。瞎猜的话是 0.25。按 `acc` 题题都对，按 `acc_norm` 却不是：小姑娘最爱的 rice 是个短词，
# 平均到每个字符，反而被很长的 sweet potatoes 超过了。题目少的时候，正确率本身也不准，所以 `evaluate.py` 还给出标准误差（standard error，± 后面的数）。
# 两个模型相差不到它的两倍左右，就可能只是碰巧。
#
# ## 接着读什么
#
# 每字节比特数和对数似然在 `training/scoring.py`，基准测试在 `tasks/items.py`，
# 抽样是 `kernels.draw`，带缓存的生成循环是 `model.py` 里的 `GPT.stream`。
# %% [markdown] lang=en
# ## Exercises
#
# 1. **Perplexity** (困惑度) is $e^{\text{loss}}$: between how many equally likely tokens does the model hesitate? Compute it for both
#    models. Why does the smaller one not belong to the better model?
# 2. How many tokens does `top_p = 0.9` keep after each character of the line 清晨，老船工在桥头吃面条。? Where is it one, where more?
# 3. A much simpler model counts how often each byte follows each byte. Measure its bits per byte on the validation text, and
#    compare with the transformer and the bound.
#
# <details><summary>Solutions in words</summary>
#
# 1. The perplexity counts per token, and the tokens are different ones. A byte model hesitates less per token because most of
#    its tokens only complete a character.
# 2. It is one where the sentence leaves no choice, and more where something is drawn: time, person, place, food. A fixed `top_k`
#    cannot do this.
# 3. It looks back one byte only, so it cannot know which person eats. It lies far above the bound; the distance
#    is what attention is worth here.
# </details>
# %% [markdown] lang=zh
# ## 练习
#
# 1. **困惑度**（perplexity）就是 $e^{\text{loss}}$：相当于模型在多少个等可能的词元之间犹豫。算出两个模型的困惑度。
#    为什么数字小的那个不一定更好？
# 2. 对“清晨，老船工在桥头吃面条。”这句话，`top_p = 0.9` 在每个字之后留下几个词元？哪里只留一个，哪里更多？
# 3. 一个简单得多的模型：只统计每个字节后面跟着各个字节的次数。算出它在验证文本上的每字节比特数，和 Transformer、和下界比一比。
#
# <details><summary>答案（文字）</summary>
#
# 1. 困惑度是按词元算的，而两个模型的词元不一样。按字节的模型每一步犹豫得少，是因为它的许多词元只是把一个字补全。
# 2. 句子没有别的选择时只留一个；轮到抽签的地方（时间、人物、地点、食物）就会多。固定的 `top_k` 做不到这一点。
# 3. 它只看前一个字节，不知道是谁在吃，所以离下界很远。这段差距，就是注意力在这里的价值。
# </details>
# %% solution
for name, (each_model, each_tokenizer) in models.items():
    loss, bits = measure(each_model, each_tokenizer, f'{HERE}/{name}')
    print(f'{name}: perplexity {math.exp(loss):.3f}, {bits:.4f} bits per byte')
# %% solution
line, counts = '清晨，老船工在桥头吃面条。', []
for end in range(len(line)):
    p = reshape(next_logits('\n' + line[:end]), top_p=0.9)
    counts.append(int((p > 0).sum()))
print(' '.join(f'{count}{character}' for count, character in zip(counts, line, strict=True)))
assert counts[0] > counts[-1]
# %% solution
train_bytes = (HERE / 'byte/train.bin').read_bytes()[::2]  # 2 bytes a token; the first is the byte itself
val_bytes = (HERE / 'byte/val.bin').read_bytes()[::2]
pairs, singles = Counter(zip(train_bytes, train_bytes[1:], strict=False)), Counter(train_bytes)
bits = [-math.log2((pairs[pair] + 0.01) / (singles[pair[0]] + 2.56)) for pair in zip(val_bytes, val_bytes[1:], strict=False)]
pair_model = sum(bits) / len(bits)
transformer = measure(*models["byte"], f"{HERE}/byte")[1]
print(f'counting pairs {pair_model:.3f}, transformer {transformer:.3f}, bound {bound:.3f}')
assert pair_model > bound
