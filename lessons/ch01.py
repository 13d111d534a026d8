# %% [markdown] lang=en
# # Chapter 1: from text to tokens
#
# A neural network computes with numbers, and a text is not made of numbers. This chapter turns text into
# **tokens** (词元): integers, each of which stands for a small piece of text. The piece can be a byte, a
# character, a word, or something in between, and the choice decides how long a text is for the model.
#
# By the end you will have written **byte-pair encoding** (BPE, 字节对编码), the method of GPT-2 and most
# later models, and compared it with this repository's implementation.
# %% [markdown] lang=zh
# # 第一章　从文本到词元
#
# 神经网络只会算数，而文本不是数。所以第一步是把文本变成一串**词元**（token）：
# 每个词元是一个整数，代表一小段文本。这一小段可以是一个字节、一个字、一个词，也可以介于三者之间。
# 怎么切，决定了一篇文本在模型眼里有多长。
#
# 读完这一章，你会亲手写出**字节对编码**（byte-pair encoding，BPE）——GPT-2 和后来绝大多数模型用的都是它——
# 并且和本仓库里的实现逐个词元核对一遍。
# %%
import logging
import os
import sys
from collections import Counter
from pathlib import Path

# notebooks start in their own folder: go up to the repository's
os.chdir(next(folder for folder in (Path.cwd(), *Path.cwd().parents) if (folder / 'model.py').exists()))
sys.path.insert(0, '')

import regex

from corpus.train_tokenizer import train_bpe
from lessons.helpers import COLOURS, SMALL, chinese_kinds, labels, picture, show
from tokens.tokenizer import BPE_PATTERN, BPETokenizer, ByteTokenizer, CharTokenizer, GPT2Tokenizer
from tokens.tokenizer_json import byte_characters
# %% [markdown] lang=en
# ## What a computer stores
#
# Python's `str` is a sequence of characters. Unicode gives every character a number, its **code point** (码点).
# A file, however, holds **bytes** (字节), numbers from 0 to 255. UTF-8 is the rule that writes a code point as
# one to four bytes: a Latin letter takes one, a common Chinese character three.
# %% [markdown] lang=zh
# ## 计算机里存的是什么
#
# Python 的 `str` 是一串字符。Unicode 给每个字符编了号，这个号叫**码点**（code point）。
# 但文件里存的是**字节**（byte），也就是 0 到 255 的数。UTF-8 规定怎样把一个码点写成 1 到 4 个字节：
# 英文字母占一个，常用汉字占三个。
# %%
for character in 'A河é':
    print(character, 'code point', ord(character), 'bytes', list(character.encode('utf-8')))
# %% [markdown] lang=en
# ## Real text
#
# We read three kinds of Chinese: Song dynasty poems, short dialogues, and the prose of a computer handbook.
# They come from package mirrors and are cached. Without a network, made-up sentences stand in for the poems.
#
# The cell prints how many characters and bytes each kind has, and how many *different* characters. The poems have
# nearly three bytes per character. The handbook has fewer than two, because it is full of commands and English words.
# %% [markdown] lang=zh
# ## 真实的文本
#
# 下面读三种中文：宋词、日常对话，还有一本计算机手册。它们来自软件包镜像，下载一次以后就缓存在本地。
# 没有网络时，用几条规则拼出来的句子代替宋词。
#
# 这一格打印每种文本有多少字、多少字节，以及有多少个**不同**的字。宋词平均每个字将近三个字节；
# 手册不到两个，因为里面有大量的命令和英文。
# %%
kinds = chinese_kinds()
for kind, content in kinds.items():
    n_bytes = len(content.encode('utf-8'))
    print(f'{kind:10} {len(content):9,} characters {n_bytes:10,} bytes {len(set(content)):6,} different characters')
poems = kinds['poems'][:30_000 if SMALL else 400_000]
# %% [markdown] lang=en
# ## Three simple ways to cut
#
# **By character** (按字). The vocabulary (词表) is the set of characters of the training text, and the position
# of a character in it is its id. `CharTokenizer` in `tokens/tokenizer.py` does this.
# %% [markdown] lang=zh
# ## 三种最简单的切法
#
# **按字切**（character-level）。把训练文本里出现过的字排成一张**词表**（vocabulary），每个字在表里的位置就是它的编号。
# `tokens/tokenizer.py` 里的 `CharTokenizer` 就是这样做的。
# %%
by_character = CharTokenizer(''.join(sorted(set(poems))))
line = poems.split('\n')[2]
ids = by_character.encode(line)
print(line)
print(ids)
print(by_character.decode(ids) == line)
# %% [markdown] lang=en
# This is simple, but a character that does not occur in the training text has no id at all. Let us build the
# vocabulary from the first nine tenths of the poems and look at the last tenth.
# %% [markdown] lang=zh
# 简单是简单，可是训练文本里没出现过的字就没有编号。我们用前九成宋词建词表，再看后一成里有多少字不在表里。
# %%
def unseen(pieces_before, pieces_after):
    vocabulary = set(pieces_before)
    missing = [piece for piece in pieces_after if piece not in vocabulary]
    return len(vocabulary), len(missing) / len(pieces_after)


cut = len(poems) * 9 // 10
n_vocabulary, share = unseen(poems[:cut], poems[cut:])
print(f'characters: {n_vocabulary:,} in the vocabulary, {share:.2%} of the rest are not in it')
# %% [markdown] lang=en
# **By word** (按词). Chinese has no spaces, so a program has to find the words. `jieba` is such a program; it uses
# a dictionary and word frequencies. Words carry more meaning than characters, and a
# sentence has fewer of them. But the vocabulary keeps growing with the text, and a larger part of a new text is missing from it.
# %% [markdown] lang=zh
# **按词切**（word-level）。中文的词之间没有空格，得用程序分词。`jieba` 就是一个分词工具，靠的是词典和词频。
# 词比字的含义更完整，同一句话切成词也更短。可是词表会越长越大，新文本里不在表里的词也更多。
# %%
try:
    import jieba
    jieba.setLogLevel(logging.WARNING)
    cut_words = jieba.lcut
    n_vocabulary, share = unseen(cut_words(poems[:cut]), cut_words(poems[cut:]))
    print(' | '.join(cut_words('老船工沿着河岸慢慢走回家')))
    print(f'words: {n_vocabulary:,} in the vocabulary, {share:.2%} of the rest are not in it')
except ImportError:
    cut_words = None
    print('jieba is not installed (pip install jieba): this chapter goes on without words')
# %% [markdown] lang=en
# **By byte** (按字节). There are only 256 different bytes, so nothing is ever missing: any text in any language, even an
# emoji, is a sequence of bytes. The price is length: a Chinese text becomes three times as long. That matters,
# because a model reads a fixed number of tokens at a time (its **context**, 上下文) and computes for each of them.
# %% [markdown] lang=zh
# **按字节切**（byte-level）。字节一共只有 256 种，所以永远不会有“不在表里”的情况：任何语言、甚至表情符号，都是一串字节。
# 代价是长：一篇中文会变成三倍长。长度很要紧，因为模型一次只能读固定数目的词元（它的**上下文**，context），
# 每个词元都要花计算量。
# %%
print(ByteTokenizer().encode('老船工 🚣'))
# %% [markdown] lang=en
# ## Byte-pair encoding
#
# BPE starts from bytes, so that nothing is ever missing, and then makes frequent sequences short:
#
# 1. Cut the text into bytes.
# 2. Count every pair of neighbours.
# 3. Make the most frequent pair a new token, everywhere in the text.
# 4. Repeat from step 2 until the vocabulary is as large as you want.
#
# A practical detail comes first. The text is cut into stretches that merging never crosses (**pre-tokenization**, 预切分),
# such as a run of Chinese characters, a word with the space in front of it, or a run of punctuation. Otherwise a full stop and
# the word after it could become one token. `BPE_PATTERN` is the regular expression that this repository uses.
# %% [markdown] lang=zh
# ## 字节对编码（BPE）
#
# BPE 从字节出发，所以不会漏掉任何东西；然后把常见的字节串变短：
#
# 1. 把文本切成字节。
# 2. 数一数每一对相邻的词元出现多少次。
# 3. 把出现最多的那一对合并成一个新词元，文本里处处照办。
# 4. 回到第 2 步，直到词表够大为止。
#
# 动手之前还有一个细节：先把文本切成小段，合并不能跨段，这叫**预切分**（pre-tokenization）。一串汉字是一段，一个英文单词连同前面的空格是一段，
# 一串标点也是一段。不然的话，句号和后一句的头一个字就可能并成一个词元。
# 本仓库用正则表达式 `BPE_PATTERN` 来切段。
# %%
cut_text = regex.compile(BPE_PATTERN, regex.VERSION1).findall  # VERSION1: [A&&[^B]] means A without B
print(cut_text('雨后，老船工说：Good morning, 2026!'))
# %% [markdown] lang=en
# Equal stretches are stored once, with their count. A stretch is a tuple of byte strings, so merging a pair only means
# joining two neighbouring strings.
# %% [markdown] lang=zh
# 相同的段只存一份，记下出现的次数。每一段写成由字节串组成的元组，合并一对，就是把相邻的两个字节串接起来。
# %%
def as_bytes(stretch):
    return tuple(bytes([byte]) for byte in stretch.encode('utf-8'))


def count_pairs(stretches):
    pairs = Counter()
    for pieces, count in stretches.items():
        for pair in zip(pieces, pieces[1:], strict=False):
            pairs[pair] += count
    return pairs


def merge(pieces, pair):
    """Join every occurrence of the pair, from left to right."""
    merged, i = [], 0
    while i < len(pieces):
        if pieces[i:i + 2] == pair:
            merged.append(pair[0] + pair[1])
            i += 2
        else:
            merged.append(pieces[i])
            i += 1
    return tuple(merged)


print(merge(as_bytes('abab'), (b'a', b'b')))
# %% [markdown] lang=en
# Now the loop. If several pairs are equally frequent, `max` takes the one whose bytes are largest, so that every run gives
# the same result.
# %% [markdown] lang=zh
# 现在写主循环。几对的次数相同时，`max` 取字节最大的那一对，这样每次运行的结果都一样。
# %%
def train(text, n_merges, cut_text=cut_text):
    counts = Counter(cut_text(text))
    stretches = {as_bytes(stretch): count for stretch, count in counts.items()}
    merges = []
    for _ in range(n_merges):
        pairs = count_pairs(stretches)
        best = max(pairs, key=lambda pair: (pairs[pair], pair))
        merges.append(best)
        stretches = {merge(pieces, best): count for pieces, count in stretches.items()}
    return merges


merges = train(poems[:20_000], 60 if SMALL else 300)
for number in range(3):
    joined = b''.join(merges[number])
    print(f'merge {number}: {merges[number]} -> {joined.decode("utf-8", errors="replace")!r}')
whole = [text for text in (b''.join(pair).decode('utf-8', errors='replace') for pair in merges) if '�' not in text]
print(len(whole), 'of', len(merges), 'new tokens are whole characters or more:')
print(' '.join(whole[:10]), '...', ' '.join(whole[-10:]))
# %% [markdown] lang=en
# The first merges join bytes with which many characters begin, such as `e3 80` (in hexadecimal) of 。 and 、. These are not
# characters yet, and print as `�`. Then come common characters and punctuation, and later whole words.
#
# To **encode** (编码) a new text, apply the merges in the order in which training made them. To **decode** (解码),
# join the bytes.
# %% [markdown] lang=zh
# 最先合并出来的是许多字符共有的前两个字节，例如 。 和 、 开头的 `e3 80`（十六进制）：它们还不是完整的字符，所以打印成 `�`。
# 接着是常用的字和标点，再往后就是整个的词。
#
# 给新文本**编码**（encode）时，按训练时的先后顺序依次合并；**解码**（decode）时，把字节接起来就行。
# %%
def encode(text, merges):
    tokens = []
    for stretch in cut_text(text):
        pieces = as_bytes(stretch)
        for pair in merges:
            pieces = merge(pieces, pair)
        tokens += pieces
    return tokens


sentence = '春风又绿江南岸，明月何时照我还？'
tokens = encode(sentence, merges)
print(len(sentence), 'characters,', len(sentence.encode('utf-8')), 'bytes,', len(tokens), 'tokens')
print([token.decode('utf-8', errors='replace') for token in tokens])
assert b''.join(tokens).decode('utf-8') == sentence
# %% [markdown] lang=en
# ## The same in this repository
#
# `BPETokenizer` reads merges in the format of GPT-2's `merges.txt`. There each byte is written as one visible character,
# because a real space or line break would separate entries. We hand our merges over, and both must cut every text alike.
# %% [markdown] lang=zh
# ## 和本仓库的实现对一对
#
# `BPETokenizer` 读的是 GPT-2 的 `merges.txt` 格式，其中每个字节写成一个看得见的字符，因为真正的空格和换行是用来分隔各项的。
# 把我们的合并表交给它，两边切出来的词元必须完全一样。
# %%
character_of = {byte: character for character, byte in byte_characters().items()}
lines = [' '.join(''.join(character_of[byte] for byte in piece) for piece in pair) for pair in merges]
tokenizer = BPETokenizer('\n'.join(lines))
for text in [sentence, 'Good morning, 2026!', '老船工 🚣', poems[-2000:]]:
    ids = tokenizer.encode(text)
    assert [tokenizer.pieces[i] for i in ids] == encode(text, merges)
print(tokenizer.vocab_size, '= 256 bytes +', len(merges), 'merges +', len(tokenizer.special), 'special tokens')
print(list(tokenizer.special))
# %% [markdown] lang=en
# The special tokens (特殊词元) stand for no text: `<|endoftext|>` separates documents, others mark who speaks in a
# conversation (chapter 7).
#
# Our loop counts all pairs again after each merge. `train_bpe` calls the `tokenizers` library, which updates only the
# counts that change. It learns thousands of merges in seconds.
# %% [markdown] lang=zh
# **特殊词元**（special token）不代表任何文本：`<|endoftext|>` 隔开两篇文档，另外几个标明对话里是谁在说话（第七章会用到）。
#
# 我们的循环每合并一次就把所有的对重新数一遍。`train_bpe` 调用 `tokenizers` 库，只更新变动的计数，
# 几秒钟就能学几千次合并。
# %%
sizes = [300, 350, 400] if SMALL else [512, 1024, 2048, 4096]
trained = {size: train_bpe([poems], size) for size in sizes}
largest = trained[sizes[-1]]
n_tokens = len(largest.encode(sentence))
print(f'{largest.vocab_size} tokens in the vocabulary: the sentence takes {n_tokens}')
print([largest.decode([i]) for i in largest.encode(sentence)])
# %% [markdown] lang=en
# ## What a sentence costs
#
# The picture compares tokenizers on four sentences. GPT-2's vocabulary of 50,257 tokens was trained on English.
# It knows few Chinese characters, so a Chinese character costs it between two and three tokens, nearly as many as
# bytes would.
# %% [markdown] lang=zh
# ## 一句话要花多少词元
#
# 下面的图用四句话比较各种切法。GPT-2 的词表有 50,257 个词元，但它是在英文上训练的，认得的汉字很少：
# 一个汉字要花两三个词元，比按字节切省不了多少。
# %%
sentences = {
    'poem 词': sentence,
    'talk 对话': '你好，请问去火车站坐几路车？',
    'manual 手册': '修改配置文件以后，需要重新启动服务。',
    'English 英文': 'The old boatman walked slowly along the river.',
}
methods = {'bytes 字节': ByteTokenizer().encode}
try:
    methods['GPT-2'] = GPT2Tokenizer().encode
except OSError:
    print("GPT-2's merges are out of reach: the picture goes without them")
methods['our BPE 自训'] = largest.encode
methods['characters 字'] = list
if cut_words:
    methods['words 词'] = cut_words

figure = picture(9, 3.8)
axes = figure.subplots()
for number, (name, count) in enumerate(zip(labels(methods), methods.values(), strict=True)):
    heights = [len(count(text)) for text in sentences.values()]
    places = [i + (number - len(methods) / 2 + 0.5) * 0.16 for i in range(len(sentences))]
    bars = axes.bar(places, heights, width=0.15, label=name, color=COLOURS[number])
    axes.bar_label(bars, fontsize=7)
axes.set_xticks(range(len(sentences)), labels(sentences))
axes.set_ylabel('tokens')
figure.legend(loc='outside upper center', fontsize=9, frameon=False, ncols=len(methods))
show(figure)
# %% [markdown] lang=en
# Note two things. Characters and words look cheap, but they fail on anything new. And our BPE was trained on poems alone,
# so the manual costs it more, and English costs it one token per byte. **Train a tokenizer on the kind
# of text that the model will read.**
#
# ## How large a vocabulary?
#
# More merges make the text shorter. But look at the horizontal axis: each *doubling* of the vocabulary gains about the
# same, so the next thousand tokens always gain less than the thousand before. And each token needs a row of numbers in
# the model (chapter 3), so a small model should not have a large vocabulary.
# %% [markdown] lang=zh
# 看图时注意两点。按字、按词看上去省，但遇到没见过的东西就没办法了。我们的 BPE 只读过宋词，所以手册要花更多词元，
# 英文则退回到一个字节一个词元。**模型将来读什么文本，就用什么文本训练分词器**（tokenizer）。
#
# ## 词表要多大？
#
# 合并次数越多，文本越短。但请看横轴：词表每**翻一倍**，收益才差不多，也就是说，再加一千个词元，好处总不如前一千个。
# 而且词表里每个词元都要在模型里占一行参数（第三章），所以小模型不宜配大词表。
# %%
held_out = kinds['poems'][-20_000:]
characters_per_token = [len(held_out) / len(each.encode(held_out)) for each in trained.values()]
figure = picture(6, 3)
axes = figure.subplots()
axes.plot(sizes, characters_per_token, marker='o', color=COLOURS[0])
axes.axhline(1, color='grey', linestyle=':', label='one token per character')
axes.axhline(1 / 3, color='grey', linestyle='--', label='bytes')
axes.set(xscale='log', xlabel='tokens in the vocabulary', ylabel='characters per token', ylim=(0, None))
axes.set_xticks(sizes, sizes, minor=False)
axes.minorticks_off()
axes.legend(fontsize=8, frameon=False)
show(figure)
# %% [markdown] lang=en
# ## Where to go on
#
# `tokens/tokenizer.py` holds the tokenizers, `corpus/train_tokenizer.py` the training. On the command line:
#
# ```sh
# python -m corpus.train_tokenizer train --input TEXT --vocab_size=4096 --out=data/tokenizers/mine
# python -m corpus.train_tokenizer compare --input TEXT --tokenizers gpt2 byte data/tokenizers/mine
# ```
# %% [markdown] lang=zh
# ## 接着读什么
#
# 各种分词器在 `tokens/tokenizer.py`，训练在 `corpus/train_tokenizer.py`。在命令行里这样用：
#
# ```sh
# python -m corpus.train_tokenizer train --input TEXT --vocab_size=4096 --out=data/tokenizers/mine
# python -m corpus.train_tokenizer compare --input TEXT --tokenizers gpt2 byte data/tokenizers/mine
# ```
# %% [markdown] lang=en
# ## Exercises
#
# 1. Which are the five longest tokens of `largest`, in characters? What kind of text do they come from?
# 2. A model writes one token at a time. What does `decode` give for the tokens of 🚣 one by one, and why?
# 3. Cut the dialogues by the pattern `.+` (whole lines), so that merging may cross punctuation, and train as many merges
#    as above. Do tokens appear that hold both a character and a punctuation mark?
#
# <details><summary>Solutions in words</summary>
#
# 1. They are names of tunes and fixed phrases, which recur again and again. □ marks a lost character.
# 2. Each byte of the emoji is a token of its own, and a single byte is no character. So decode shows `�` until all four
#    are together. A program that prints text while it is generated has to hold such bytes back.
# 3. Yes: questions end in "吗?" so often that the two become one token. The model would then have one "吗" with a
#    question mark and another one without, and would have to learn twice what the word means.
#
# The next cells hold the code. They are folded in Jupyter.
# </details>
# %% [markdown] lang=zh
# ## 练习
#
# 1. `largest` 里最长（按字数）的五个词元是什么？它们来自什么样的文本？
# 2. 模型一次写一个词元。把 🚣 的词元一个一个地 `decode`，会得到什么？为什么？
# 3. 用正则表达式 `.+`（整行一段）来切对话，让合并可以跨过标点，训练次数同上。会不会出现又含汉字又含标点的词元？
#
# <details><summary>答案（文字）</summary>
#
# 1. 是词牌名和固定的搭配：反复出现的东西才会变成一个词元。□ 表示原书缺字。
# 2. 这个表情的每个字节各是一个词元，而单个字节不成字，所以在四个字节凑齐以前只能显示 `�`。
#    一边生成一边显示的程序，必须先把这样的字节扣住。
# 3. 会：问句总以“吗?”结尾，于是这两个字符并成了一个词元。这样一来，带问号的“吗”和不带问号的“吗”成了两个词元，
#    模型得把这个字的意思学两遍。
#
# 代码在下面几格里，在 Jupyter 中是折叠的。
# </details>
# %% solution
pieces = [piece.decode('utf-8', errors='ignore') for piece in largest.pieces[:-len(largest.special)]]
print(sorted(pieces, key=len, reverse=True)[:5])
# %% solution
boat = largest.encode('🚣')
print([largest.decode([i]) for i in boat], '->', largest.decode(boat))
# %% solution
whole_lines = train(kinds.get('dialogue', poems)[:20_000], len(merges), regex.compile('.+').findall)
crossing = [b''.join(pair).decode('utf-8', errors='ignore') for pair in whole_lines]
print([token for token in crossing if len(token) > 1 and not token.isalpha()])
