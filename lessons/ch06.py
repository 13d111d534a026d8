# %% [markdown] lang=en
# # Chapter 6: the Chinese pipeline
#
# Before a model can be trained, somebody has to turn piles of files into token files: read, clean, cut into documents, train a
# tokenizer, pack, mix. In practice this takes more time than the training. This chapter walks the whole way with the
# commands of the repository, from three kinds of files that Chinese corpora come in:
#
# - **folders of text files** by category, as in THUCNews;
# - a **dump of Wikipedia** (维基百科转储): XML with wiki markup in it;
# - an **Arrow** data set, as the library `datasets` saves it.
#
# All content is made up on the spot, so the chapter needs no network. With real files, only the paths change.
# %% [markdown] lang=zh
# # 第六章　中文数据流水线
#
# 训练之前，得先把一堆堆文件变成词元文件：读取、清洗、切成文档、训练分词器、打包、混合。
# 实际工作中，这些往往比训练本身更花时间。这一章用本仓库的命令把整条路走一遍，原料是中文语料最常见的三种形式：
#
# - **按类别分的文件夹**，里面是文本文件，THUCNews 就是这样；
# - **维基百科转储**（Wikipedia dump），一个 XML 文件，正文里夹着维基标记；
# - **Arrow** 数据集，由 `datasets` 库保存。
#
# 所有内容都是现场造的，所以不需要联网。换成真实文件，只要改路径。
# %%
import json
import os
import random
import shutil
import sys
from pathlib import Path

# notebooks start in their own folder: go up to the repository's
os.chdir(next(folder for folder in (Path.cwd(), *Path.cwd().parents) if (folder / 'model.py').exists()))
sys.path.insert(0, '')

import numpy as np

from corpus.encode import cleaned
from corpus.wiki import plain_text
from lessons.helpers import COLOURS, SMALL, WORK, picture, run, show
from tokens.dataset import Split, read_meta
from tokens.tokenizer import load_tokenizer

HERE = WORK / 'ch06'
shutil.rmtree(HERE, ignore_errors=True)  # of an earlier run
HERE.mkdir(parents=True)
draw = random.Random(6)
# %% [markdown] lang=en
# ## News: folders of text files
#
# THUCNews has a folder for each category and a text file for each article. We write a few hundred small articles like that:
# a headline, then some sentences of the category.
# %% [markdown] lang=zh
# ## 新闻：文件夹里的文本文件
#
# THUCNews 每个类别一个文件夹，每篇文章一个文本文件。我们照样写几百篇小文章：一行标题，下面几句与类别有关的话。
# %%
CITIES = ['江城', '海州', '云港', '南山', '北原', '东湖', '西岭', '石桥']
TOPICS = {
    '体育': ('{city}队{result}{rival}队', [
        '{city}队昨天在主场迎战{rival}队。', '上半场双方都没有进球。', '下半场第{n}分钟，{city}队率先得分。',
        '全场观众超过{n}千人。', '教练说，队员们的体力比上个月好。', '下一场比赛定在{n}号举行。']),
    '财经': ('{city}上月物价{change}', [
        '{city}统计局今天公布了上月的数据。', '与去年同期相比，物价{change}百分之{n}。', '蔬菜和水果的价格{change}较多。',
        '有{n}家商店接受了调查。', '专家认为，下半年的价格会比较平稳。', '居民说，买菜的开支和去年差不多。']),
    '科技': ('{city}研究人员造出新型{thing}', [
        '{city}的研究人员介绍了一种新型{thing}。', '它的重量只有原来的百分之{n}。', '这项研究用了{n}年时间。',
        '实验表明，{thing}在低温下也能工作。', '研究人员打算明年在{rival}进行试验。', '这种{thing}的成本还需要降低。']),
}
RESULTS, CHANGES, THINGS = ['战胜', '战平', '不敌'], ['上涨', '下降'], ['电池', '机器人', '传感器', '太阳能板']


def article(topic):
    headline, sentences = TOPICS[topic]
    city, rival = draw.sample(CITIES, 2)
    words = dict(city=city, rival=rival, result=draw.choice(RESULTS), change=draw.choice(CHANGES), thing=draw.choice(THINGS))
    chosen = [each.format(n=draw.randint(2, 40), **words) for each in draw.sample(sentences, draw.randint(3, 6))]
    return headline.format(**words) + '\n' + ''.join(chosen) + '\n'


N_ARTICLES = 100 if SMALL else 400  # in each folder
for topic in TOPICS:
    (HERE / 'news' / topic).mkdir(parents=True)
    for number in range(N_ARTICLES):
        (HERE / 'news' / topic / f'{number:04}.txt').write_text(article(topic), encoding='utf-8')
print((HERE / 'news/体育/0000.txt').read_text(encoding='utf-8'))
# %% [markdown] lang=en
# Real collections are never clean. We add three typical defects: an article that occurs twice, an empty file, and one with a
# byte order mark (字节序标记), Windows line ends and a control character (控制字符).
# %% [markdown] lang=zh
# 真实的语料从来不干净。我们加上三种常见的毛病：一篇重复的文章，一个空文件，
# 还有一篇带着字节序标记（byte order mark）、Windows 换行和控制字符（control character）。
# %%
twice = (HERE / 'news/体育/0000.txt').read_text(encoding='utf-8')
(HERE / 'news/体育/copy.txt').write_text(twice, encoding='utf-8')
(HERE / 'news/体育/empty.txt').write_text('', encoding='utf-8')
dirty = '\ufeff江城队官网公告\r\n球票\x07今天\x00开售。\r\n'
(HERE / 'news/体育/dirty.txt').write_bytes(dirty.encode('utf-8'))
print(repr(dirty))
print(repr(cleaned(dirty)))
assert cleaned(dirty) == '江城队官网公告\n球票今天开售。'
# %% [markdown] lang=en
# `cleaned` is what `--clean` does to each text: line ends become `\n`, control characters go, white space around the text goes,
# and Unicode takes its composed form NFC, in which `é` is one character and not two. With `--clean`, a text that has occurred before
# is left out, too.
#
# Note what it does *not* do: it does not turn full-width punctuation (全角标点) into half-width, and it does not change traditional
# characters into simplified ones. A model should see text as people write it.
# %% [markdown] lang=zh
# `--clean` 对每篇文本做的就是 `cleaned`：换行统一成 `\n`，去掉控制字符和首尾空白，Unicode 统一成合成形式 NFC
# （例如 `é` 是一个字符而不是两个）。此外，内容重复的文本只留一份。
#
# 注意它**不**做什么：不把全角标点改成半角，也不把繁体改成简体。人们怎么写，模型就该怎么读。
# %% [markdown] lang=en
# ## Wikipedia: XML with markup
#
# A dump is one large XML file with a `<page>` for each page. The text in it is **wikitext** (维基标记): templates in `{{…}}`, links in
# `[[…]]`, tables, references. And there are pages that are no articles: redirects, talk pages, files. Ours has all of these.
# %% [markdown] lang=zh
# ## 维基百科：夹着标记的 XML
#
# 转储是一个很大的 XML 文件，每个页面是一个 `<page>`。正文用的是**维基标记**（wikitext）：`{{…}}` 是模板，`[[…]]` 是链接，
# 还有表格、脚注。有的页面根本不是条目，比如重定向、讨论页、文件页。我们造的这一份里样样都有。
# %%
RIVERS, KINDS, USES = ['青水', '白沙河', '长溪', '月牙河', '双龙江'], ['小镇', '港口', '山城', '古城'], ['茶叶', '木材', '丝绸', '水果']


def wiki_article(title):
    river, kind, use, n = draw.choice(RIVERS), draw.choice(KINDS), draw.choice(USES), draw.randint(3, 90)
    return (f'{{{{城市信息框|名称={title}|人口={n}万}}}}\n'
            f"'''{title}'''是一座位于[[{river}]]岸边的{kind}<ref>《地方志》第{n}页</ref>，人口约{n}万。\n"
            f'[[File:{title}.jpg|thumb|{title}的老街]]\n'
            f'== 历史 ==\n{title}建于{n * 10 + 900}年，最初以[[{use}|{use}贸易]]闻名。-{{zh-hans:软件; zh-hant:軟體}}-产业在近年出现。\n'
            f'== 交通 ==\n从{title}乘船沿{river}而下，{n}分钟可到{draw.choice(CITIES)}。\n'
            f'{{| class="wikitable"\n! 年份 !! 人口\n|-\n| 2020 || {n}万\n|}}\n'
            f'== 参考文献 ==\n<references/>\n[[Category:城市]]\n')


def page(title, text, ns=0):
    escaped = text.replace('&', '&amp;').replace('<', '&lt;').replace('>', '&gt;')
    return (f'<page><title>{title}</title><ns>{ns}</ns><revision><model>wikitext</model>'
            f'<text>{escaped}</text></revision></page>\n')


N_PAGES = 100 if SMALL else 400
towns = [f'{draw.choice("金银铜铁石木水火")}{draw.choice("山水桥门湖岭港原")}{draw.choice("镇县市")}' for _ in range(N_PAGES)]
pages = [page(town, wiki_article(town)) for town in towns]
pages += [page('金山', '#重定向 [[金山镇]]'), page('Talk:金山镇', '这一段写得不清楚。', ns=1)]
(HERE / 'zhwiki.xml').write_text('<mediawiki>\n' + ''.join(pages) + '</mediawiki>\n', encoding='utf-8')

wikitext = wiki_article('金山镇')
print(wikitext)
# %% [markdown] lang=en
# `corpus/wiki.py` keeps the prose. Compare line by line with what went in:
# %% [markdown] lang=zh
# `corpus/wiki.py` 只留下正文。和上面逐行比一比：
# %%
text = plain_text(wikitext)
print(text)
assert not any(mark in text for mark in ('{{', '[[', '<ref', '==', 'wikitable', 'Category', 'zh-hans', '参考文献'))
# %% [markdown] lang=en
# The template, the picture, the footnote, the table and the category are gone; a link leaves its words; of the two ways to write
# 软件 the simplified one stays; and the heading 参考文献 (references) went with its section, which would have been empty.
#
# ## Dialogue: an Arrow data set
#
# `datasets` is the usual library for data sets, and **Arrow** is its format on disk: columns, not lines, which can be read without
# loading everything into memory. We save short dialogues that way.
# %% [markdown] lang=zh
# 模板、图片、脚注、表格和分类都没有了；链接留下了文字；“软件”的两种写法取了简体；“参考文献”这一节去掉内容就空了，所以标题也一起去掉。
#
# ## 对话：Arrow 数据集
#
# 处理数据集常用 `datasets` 库，它存盘的格式是 **Arrow**：按列存放，不必全部读进内存就能取用。我们用它存一些简短的对话。
# %%
import warnings

warnings.filterwarnings('ignore', 'IProgress')  # a bar that only some notebooks can show
import datasets

datasets.disable_progress_bars()
ASKS = ['请问去{city}怎么走？', '你去过{city}吗？', '{city}今天下雨吗？', '{city}有什么好吃的？']
REPLIES = ['坐船去，{n}分钟就到。', '去年去过，住了{n}天。', '听说下午会下，记得带伞。', '那里的鱼汤很有名，{n}块钱一碗。']
dialogues = []
for _ in range(200 if SMALL else 1500):
    number, words = draw.randrange(4), dict(city=draw.choice(CITIES), n=draw.randint(2, 40))
    dialogues.append({'text': f'甲：{ASKS[number]}\n乙：{REPLIES[number]}'.format(**words)})
datasets.Dataset.from_list(dialogues).save_to_disk(HERE / 'dialogues')
print(sorted(path.name for path in (HERE / 'dialogues').iterdir()))
print(dialogues[0]['text'])
# %% [markdown] lang=en
# ## A tokenizer for all three
#
# One tokenizer has to serve all sources, otherwise they cannot be mixed. So it is trained on all of them (chapter 1 explains how).
# `compare` shows what is gained.
# %% [markdown] lang=zh
# ## 三种语料，一个分词器
#
# 各种来源必须共用一个分词器，否则没法混合，所以要在全部语料上训练（原理见第一章）。`compare` 显示它省了多少。
# %%
SOURCES = [HERE / 'news', HERE / 'zhwiki.xml', HERE / 'dialogues']
VOCAB_SIZE = 600 if SMALL else 1000
run('-m', 'corpus.train_tokenizer', 'train', '--input', *SOURCES, f'--vocab_size={VOCAB_SIZE}', f'--out={HERE}/tokenizer', n_lines=1)
compared = run('-m', 'corpus.train_tokenizer', 'compare', '--input', HERE / 'news', '--tokenizers', 'byte', f'{HERE}/tokenizer', n_lines=3)
# %% [markdown] lang=en
# ## Packing
#
# **Packing** (打包) writes the tokens of all documents one after another into one file, with `<|endoftext|>` between two
# documents. Each source becomes a data set of its own.
# %% [markdown] lang=zh
# ## 打包
#
# **打包**（packing）就是把所有文档的词元首尾相接写进一个文件，两篇文档之间放一个 `<|endoftext|>`。每种来源各成一个数据集。
# %%
for name, source in zip(('news', 'wiki', 'dialogue'), SOURCES, strict=True):
    fields = '--field=title,text' if name == 'wiki' else '--field=text'
    run('-m', 'corpus.pack', 'build', '--input', source, fields, f'--tokenizer={HERE}/tokenizer', '--clean',
        '--val_fraction=0.05', f'--out={HERE}/packed/{name}', n_lines=4)
# %% [markdown] lang=en
# Look at the lines `left out`: of the news the copy, and articles that came out
# alike by chance (an empty file yields no document at all); of the wiki the redirect (talk pages do not
# count as documents); of the dialogues very many, because few different ones exist. Why does it matter? A model that reads the same text
# ten times learns it by heart. And if a validation text also stands in the training data, the validation loss is too good to be true.
#
# Nothing in the file is secret. `train.bin` is a row of 16-bit numbers, `train.idx` says where each document begins and how long it is.
# %% [markdown] lang=zh
# 看 `left out` 那几行：新闻去掉了重复的那篇，还有碰巧写得一模一样的几篇（空文件里没有文档，不计在内）；维基百科去掉了重定向（讨论页本来就不算文档）；
# 对话去掉得最多，因为真正不同的没有几句。为什么要去重？同样的文本读十遍，模型就背下来了；
# 验证集里的文本如果训练集里也有，验证损失就会好得不真实。
#
# 文件里没有什么秘密：`train.bin` 是一串 16 位整数，`train.idx` 记着每篇文档从哪里开始、有多长。
# %%
tokenizer = load_tokenizer(read_meta(HERE / 'packed/news')['tokenizer'])
ids = np.fromfile(HERE / 'packed/news/train.bin', dtype='<u2')
print(ids[:12])
print([tokenizer.decode([i]) for i in ids[:12].tolist()])

split = Split(HERE / 'packed/news', 'train')
starts, lengths = split.documents()
print(tokenizer.decode(ids[starts[3]:starts[3] + lengths[3]].tolist()))
n_packed = sum(part['documents'] for part in read_meta(HERE / 'packed/news')['splits'].values())
print(n_packed, 'documents of', 3 * N_ARTICLES + 3, 'files')
assert n_packed <= 3 * N_ARTICLES + 1
assert (ids == tokenizer.eot).sum() >= len(starts) - 1
# %% [markdown] lang=en
# Which documents are for validation? Not the last ones and not random ones: a **hash** (哈希), a number computed from the text,
# decides. So a document stays in its split when others are added.
#
# ## Mixing
#
# The sources differ in size, and size is not importance. A **mixture** (混合) gives each source its share of the training tokens. By
# size the news would be nearly half of it. We want as much of the encyclopedia as of the news, and a fifth of dialogue.
# %% [markdown] lang=zh
# 哪些文档用来验证？不是最后几篇，也不是随便抽的，而是由文本算出来的一个数——**哈希**（hash）——决定。
# 所以以后再添文档，原来的文档还在原来的那一边。
#
# ## 混合
#
# 各种来源多少不一，可多不等于重要。**混合**（mixture）就是规定每种来源占训练词元的多大比例。按实际数量，新闻会占将近一半；
# 我们希望百科和新闻一样多，对话占五分之一。
# %%
SHARES = {'news': 0.4, 'wiki': 0.4, 'dialogue': 0.2}
mixture = ','.join(f'{HERE}/packed/{name}:{share}' for name, share in SHARES.items())
run('-m', 'corpus.pack', 'mix', mixture, f'--out={HERE}/packed/mixed', n_lines=3)

n_tokens = {name: read_meta(HERE / 'packed' / name)['splits']['train']['tokens'] for name in (*SHARES, 'mixed')}
total = sum(n_tokens[name] for name in SHARES)
mixed_ids = np.fromfile(HERE / 'packed/mixed/train.bin', dtype='<u2')
documents = tokenizer.decode(mixed_ids.tolist()).split('<|endoftext|>')
in_mixture = {'dialogue': 0, 'wiki': 0, 'news': 0}
for document in documents:
    name = 'news'
    if document.startswith('甲：'):
        name = 'dialogue'
    elif '是一座位于' in document:
        name = 'wiki'
    in_mixture[name] += len(tokenizer.encode(document)) + 1
for name, share in SHARES.items():
    print(f'{name:9} {n_tokens[name] / total:.1%} by size, {in_mixture[name] / len(mixed_ids):.1%} in the mixture, {share:.0%} wanted')
    assert abs(in_mixture[name] / len(mixed_ids) - share) < 0.03
# %%
figure = picture(8, 2.2)
axes = figure.subplots()
for number, name in enumerate(SHARES):
    before = [n_tokens[each] / total for each in SHARES]
    after = [in_mixture[each] / len(mixed_ids) for each in SHARES]
    widths = [before[number], after[number]]
    begins = [sum(before[:number]), sum(after[:number])]
    bars = axes.barh(['by size', 'mixture'], widths, left=begins, label=name, color=COLOURS[number])
    axes.bar_label(bars, [f'{width:.0%}' for width in widths], label_type='center', color='white')
axes.invert_yaxis()
axes.set(xlim=(0, 1), xlabel='share of the training tokens')
figure.legend(loc='outside upper center', ncols=3, frameon=False)
show(figure)
# %% [markdown] lang=en
# `mix` ends as soon as one source is used up. Training can also mix without writing a file: give the same shares to `--dataset=`. A small
# source is then read more often.
#
# ## Training
#
# A small model on the mixture; at several points it continues the same three beginnings, and we can watch it learn.
# %% [markdown] lang=zh
# 任何一种来源用完，`mix` 就停下。训练时也可以直接混合，不另写文件：把同样的比例写在 `--dataset=` 后面；这时小的来源会多读几遍。
#
# ## 训练
#
# 在混合语料上训练一个小模型。途中让它几次续写同样的三个开头，看着它一点点学会。
# %%
N_ITERS = 60 if SMALL else 300
SHAPE = ['--block_size=64', '--n_layer=2', '--n_head=2', '--n_embd=64'] if SMALL else ['--block_size=96', '--n_layer=3', '--n_head=4', '--n_embd=96']
output = run('train.py', 'config/train_chinese.py', f'--dataset={mixture}', f'--out_dir={HERE}/model', *SHAPE,
             f'--max_iters={N_ITERS}', f'--eval_interval={N_ITERS // 6}', f'--generate_interval={N_ITERS // 3}',
             '--generate_prompts=江城队\n石桥镇\n甲：', '--report=False', n_lines=3)
metrics = [json.loads(line) for line in (HERE / 'model/metrics.jsonl').read_text(encoding='utf-8').splitlines()]
evaluations = [line for line in metrics if 'val_bpb' in line]
figure = picture(6, 3)
axes = figure.subplots()
axes.plot([line['iter'] for line in evaluations], [line['val_bpb'] for line in evaluations], marker='o', color=COLOURS[0])
axes.set(xlabel='step', ylabel='validation, bits per byte', ylim=(0, None))
show(figure)
assert evaluations[-1]['val_bpb'] < 0.6 * evaluations[0]['val_bpb']
# %%
for part in (HERE / 'model/samples.md').read_text(encoding='utf-8').split('## Iteration ')[1:]:
    print('step', part.split()[0])
    for sample in part.split('after the prompt')[1:]:
        prompt, continuation = (' '.join(text.split()) for text in sample.split('comes'))
        print(f'    {prompt} | {continuation.partition(" **")[0][:60]}')
# %% [markdown] lang=en
# After `|` stands what the model wrote. At step 0 these are random tokens, many of them parts of characters, which print as `�`. Later
# there are sentences, and most beginnings are continued in the manner of their source. The content is not to be relied on: nobody
# told the model that numbers have to fit together. Now with `sample.py`:
# %% [markdown] lang=zh
# `|` 后面是模型写的。第 0 步是随机的词元，许多只是半个字，所以显示成 `�`；后来写得成句子了，
# 而且多半是什么开头就接什么文体。内容当然靠不住：没有人告诉过它，前后的数字应该对得上。
# 最后用 `sample.py` 写两段：
# %%
output = run('sample.py', f'--out_dir={HERE}/model', '--start=甲：请问', '--num_samples=2', '--max_new_tokens=40', '--temperature=0.7', '--seed=3')
assert output.count('甲：请问') >= 2
# %% [markdown] lang=en
# ## Where to go on
#
# With real files:
#
# ```sh
# python -m corpus.train_tokenizer train --input THUCNews zhwiki-latest-pages-articles.xml.bz2 --vocab_size=16384 --out=data/tokenizers/zh
# python -m corpus.pack build --input THUCNews --tokenizer=data/tokenizers/zh --clean --out=data/news
# python -m corpus.pack build --input zhwiki-latest-pages-articles.xml.bz2 --field=title,text --tokenizer=data/tokenizers/zh --clean --out=data/zhwiki
# python train.py config/train_chinese.py --dataset=news:0.4,zhwiki:0.6 --out_dir=out-zh
# ```
#
# `corpus/readers.py` lists the formats, `corpus/encode.py` has cleaning and the split by hash, `corpus/pack.py` the commands.
# %% [markdown] lang=zh
# ## 接着读什么
#
# 换成真实的文件就是：
#
# ```sh
# python -m corpus.train_tokenizer train --input THUCNews zhwiki-latest-pages-articles.xml.bz2 --vocab_size=16384 --out=data/tokenizers/zh
# python -m corpus.pack build --input THUCNews --tokenizer=data/tokenizers/zh --clean --out=data/news
# python -m corpus.pack build --input zhwiki-latest-pages-articles.xml.bz2 --field=title,text --tokenizer=data/tokenizers/zh --clean --out=data/zhwiki
# python train.py config/train_chinese.py --dataset=news:0.4,zhwiki:0.6 --out_dir=out-zh
# ```
#
# 能读哪些格式见 `corpus/readers.py`，清洗和按哈希划分见 `corpus/encode.py`，命令见 `corpus/pack.py`。
# %% [markdown] lang=en
# ## Exercises
#
# 1. Many older Chinese files are not UTF-8 but GBK or GB18030. Write one, pack it without naming the encoding (what does the
#    message say?), then with `--encoding=gb18030`.
# 2. Pack the news with one thread and with two (`--workers`), and show that the files are equal byte for byte.
# 3. Which documents go to validation with `--val_fraction` 0.05, and which with 0.1? Show with `split_by_hash` that the first set is a
#    part of the second. What is that good for?
#
# <details><summary>Solutions in words</summary>
#
# 1. The message names the file, the line, the likely encoding and the remedy. But the program does not read by a guess: a wrong one
#    would fill the data with wrong characters that nobody notices.
# 2. Equal. Threads only encode; a single writer writes in the order of the documents.
# 3. The hash is a fixed number between 0 and 1 (times 2^64), and the text is for validation if it lies below the fraction. Raising the fraction
#    only adds documents. A model that was trained before can be validated on the old, smaller set, which it has never seen.
# </details>
# %% [markdown] lang=zh
# ## 练习
#
# 1. 许多老的中文文件不是 UTF-8，而是 GBK 或 GB18030。写一个这样的文件，先不指定编码打包（看看提示说什么），
#    再加上 `--encoding=gb18030`。
# 2. 分别用一个线程和两个线程（`--workers`）打包新闻，证明写出的文件逐字节相同。
# 3. `--val_fraction` 取 0.05 和 0.1 时，各有哪些文档归验证？用 `split_by_hash` 证明前者是后者的一部分。这有什么好处？
#
# <details><summary>答案（文字）</summary>
#
# 1. 提示里有文件名、行号、很可能的编码和办法。但程序不会自作主张按猜的编码去读：一旦猜错，
#    数据里就会混进乱码，而且没人发现。
# 2. 完全相同。线程只管编码，写文件的只有一个，按文档的顺序写。
# 3. 哈希是一个固定的数，落在 0 和 1 之间（再乘以 2^64），小于这个比例就归验证。所以调大比例只会增加文档。
#    以前训练过的模型，还可以在原来那个小的验证集上评测，那些文档它从没见过。
# </details>
# %% solution
import subprocess

old = HERE / 'old.txt'
old.write_bytes(''.join(article('科技') for _ in range(20)).encode('gb18030'))
command = ['-m', 'corpus.pack', 'build', '--input', str(old), '--format=lines', f'--tokenizer={HERE}/tokenizer',
           '--val_fraction=0.2', f'--out={HERE}/packed/old']
ended = subprocess.run([sys.executable, *command], capture_output=True, encoding='utf-8', env={**os.environ, 'PYTHONIOENCODING': 'utf-8'})
print(ended.returncode, ended.stderr.replace(os.getcwd() + os.sep, ''))
assert ended.returncode == 2
run(*command, '--encoding=gb18030', n_lines=3)
# %% solution
for n_threads in (1, 2):
    run('-m', 'corpus.pack', 'build', '--input', HERE / 'news', f'--tokenizer={HERE}/tokenizer', '--clean',
        f'--workers={n_threads}', f'--out={HERE}/packed/threads{n_threads}', n_lines=1)
for name in ('train.bin', 'train.idx', 'val.bin', 'val.idx'):
    assert (HERE / 'packed/threads1' / name).read_bytes() == (HERE / 'packed/threads2' / name).read_bytes()
print('the same bytes')
# %% solution
from corpus.encode import split_by_hash

texts = {cleaned(path.read_text(encoding='utf-8')) for path in (HERE / 'news').rglob('*.txt')}
small, large = ({text for text in texts if split_by_hash(text, share) == 'val'} for share in (0.05, 0.1))
print(f'{len(texts)} texts: {len(small)} for validation at 0.05, {len(large)} at 0.1')
assert small <= large
