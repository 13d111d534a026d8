# %% [markdown] lang=en
# # Chapter 7: questions and answers
#
# A model that was trained on plain text continues text. Ask it a question, and it may well continue with
# another question. This chapter turns such a model into one that answers, by **fine-tuning** (微调): a short
# second training on questions with their answers.
#
# Two Chinese data sets lend their file formats: **WebQA** (a question and passages from the web, with a short
# answer) and **DuReader** (a question of a search engine's user, whole documents, and an answer in a sentence).
# Baidu gives both on request, so this chapter writes files of the same form with content of its own. What you
# do here works unchanged on the real files.
# %% [markdown] lang=zh
# # 第七章　问与答
#
# 在普通文本上训练出来的模型只会续写：你问它一个问题，它很可能接着写出另一个问题。
# 这一章把这样的模型变成会回答的模型，方法是**微调**（fine-tuning）：拿问题和答案再训练一小段时间。
#
# 我们借用两个中文数据集的文件格式：**WebQA**（一个问题，几段网页文字，答案很短）和
# **DuReader**（搜索引擎用户的提问，整篇文档，答案是一句话）。这两个数据集都要向百度申请，
# 所以本章按同样的格式自己造一批数据。这里的每一步，换成真实文件也照样能用。
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

from corpus.dialogue import answered, read_conversations
from corpus.template import Template
from kernels import IGNORE
from lessons.helpers import COLOURS, SMALL, WORK, labels, picture, run, show
from tokens.loader import Loader
from tokens.tokenizer import load_tokenizer, tokenizer_meta

HERE = WORK / 'ch07'
shutil.rmtree(HERE, ignore_errors=True)  # of an earlier run
HERE.mkdir(parents=True)
# %% [markdown] lang=en
# ## Facts about people who do not exist
#
# Each person gets a name, a home, a job and a favourite dish by chance. Nobody can *know* where 李小云 lives; the
# answer stands in the passage or nowhere. So the model has to read (this task is called **reading comprehension**,
# 阅读理解), and we can be sure that it did not remember the answer from somewhere else.
# %% [markdown] lang=zh
# ## 一群虚构的人
#
# 每个人的姓名、住处、职业和爱吃的东西都是随机抽的。没有人会“知道”李小云住在哪里：答案要么在短文里，要么哪儿也没有。
# 所以模型必须去读短文（这类任务叫**阅读理解**，reading comprehension），不可能是从别处背来的。
# %%
SURNAMES = '李王张刘陈杨赵黄周吴徐孙朱马胡林郭何高罗'
GIVEN_NAMES = [first + second for first in '小大文天明春晓立' for second in '云山河林月星海雪']
NAMES = [surname + given for surname in SURNAMES for given in GIVEN_NAMES]
FACTS = {
    'home': ['桥头', '海边', '山脚下', '河对岸', '老街上', '学校旁边', '车站附近', '竹林里', '灯塔下', '小岛上'],
    'job': ['木匠', '医生', '老师', '渔民', '厨师', '司机', '画家', '裁缝', '邮递员', '护林员'],
    'dish': ['面条', '米饭', '饺子', '豆腐', '鱼汤', '包子', '玉米', '红薯', '馒头', '青菜'],
}
STATEMENT = {'home': '住在{}', 'job': '是一名{}', 'dish': '爱吃{}'}
QUESTION = {'home': '{}住在哪里？', 'job': '{}是做什么工作的？', 'dish': '{}爱吃什么？'}
draw = random.Random(7)


def new_person(name):
    return {'name': name} | {fact: draw.choice(values) for fact, values in FACTS.items()}


def describe(person):
    """Write the three facts in one sentence, in any order."""
    parts = [STATEMENT[fact].format(person[fact]) for fact in FACTS]
    draw.shuffle(parts)
    return person['name'] + '，'.join(parts) + '。'


people = [new_person(name) for name in draw.sample(NAMES, 3)]
for person in people:
    print(describe(person))
print(f'{len(NAMES):,} names x {10 ** 3:,} combinations of facts')
# %% [markdown] lang=en
# ## The two formats
#
# **WebQA** is one JSON object: question id → question and *evidences* (passages, 证据). A passage that does not
# contain the answer is marked `no_answer`.
#
# **DuReader** is JSONL, one JSON object a line: a question, several `documents`, and several `answers` that
# people wrote. The fields `is_selected` and `most_related_para` mark the document, and in it the paragraph
# (段落), on which an answer is based.
# %% [markdown] lang=zh
# ## 两种格式
#
# **WebQA** 是一个 JSON 对象：问题编号 → 问题和若干条“证据”（evidences，也就是短文）。
# 短文里如果没有答案，答案就写成 `no_answer`。
#
# **DuReader** 是 JSONL，每行一个 JSON 对象：一个问题、几篇文档（`documents`）、几个由人写的答案（`answers`）。
# `is_selected` 标出答案出自哪篇文档，`most_related_para` 标出是其中第几个段落（从 0 数起）。
# %%
def webqa_item(number):
    person, other = (new_person(name) for name in draw.sample(NAMES, 2))
    fact = draw.choice(list(FACTS))
    return {
        'question': QUESTION[fact].format(person['name']),
        'evidences': {
            f'Q{number}#00': {'answer': [person[fact]], 'evidence': describe(person)},
            f'Q{number}#01': {'answer': ['no_answer'], 'evidence': describe(other)},
        },
    }


def dureader_item(number):
    """The right paragraph is about two people, so that the name in the question matters."""
    person, neighbour, other = (new_person(name) for name in draw.sample(NAMES, 3))
    fact = draw.choice(list(FACTS))
    paragraph = [describe(person), describe(neighbour)]
    draw.shuffle(paragraph)
    statement = STATEMENT[fact].format(person[fact])
    return {
        'question_id': number,
        'question': QUESTION[fact].format(person['name']),
        'documents': [
            {'title': '无关', 'paragraphs': [describe(other)], 'is_selected': False},
            {'title': '邻居', 'paragraphs': ['以下内容来自网友。', ''.join(paragraph)],
             'most_related_para': 1, 'is_selected': True},
        ],
        'answers': [f'{person["name"]}{statement}。', f'{statement}。'],
    }


print(json.dumps({'Q1': webqa_item(1)}, ensure_ascii=False, indent=1))
print(json.dumps(dureader_item(1), ensure_ascii=False))
# %% [markdown] lang=en
# Write files for training, and a small one of each kind for testing. The items are drawn one after another, so no
# passage of the test files is in the training files.
# %% [markdown] lang=zh
# 写出训练文件，每种格式再写一个小的测试文件。题目都是随机抽的，所以测试文件里的短文不会出现在训练文件里。
# %%
def write_webqa(path, n):
    items = {f'Q{number}': webqa_item(number) for number in range(n)}
    path.write_text(json.dumps(items, ensure_ascii=False), encoding='utf-8')


def write_dureader(path, n):
    lines = [json.dumps(dureader_item(number), ensure_ascii=False) + '\n' for number in range(n)]
    path.write_text(''.join(lines), encoding='utf-8')


N_TRAIN, N_TEST = (800, 60) if SMALL else (3000, 200)
write_webqa(HERE / 'webqa.train.json', N_TRAIN)
write_webqa(HERE / 'webqa.test.json', N_TEST)
write_dureader(HERE / 'dureader.train.json', N_TRAIN)
write_dureader(HERE / 'dureader.test.json', N_TEST)
for path in sorted(HERE.glob('*.json')):
    print(f'{path.name}: {path.stat().st_size:,} bytes')
# %% [markdown] lang=en
# ## One form for all: turns
#
# `corpus/dialogue.py` recognizes both formats by their fields and gives every item the same form: a list of
# **turns** (轮次), pairs of a role (角色) and a text. `user` asks, `context` is the passage, `assistant` answers.
# A passage without an answer becomes a conversation without one, and `answered` drops it.
# %% [markdown] lang=zh
# ## 统一成“轮次”
#
# `corpus/dialogue.py` 根据字段名认出这两种格式，把每道题都变成同一个样子：一列**轮次**（turn），
# 每一轮由角色（role）和文字组成。`user` 提问，`context` 是短文，`assistant` 回答。
# 没有答案的短文会变成没有回答的对话，由 `answered` 去掉。
# %%
for name in ('webqa', 'dureader'):
    conversations = list(read_conversations([HERE / f'{name}.test.json']))
    kept = [answered(conversation.turns) for conversation in conversations]
    turns = next(turns for turns in kept if turns)
    print(f'{name}: {len(conversations)} conversations, {sum(map(bool, kept))} with an answer')
    for role, text in turns:
        print(f'    {role:10}{text}')
    assert [role for role, _ in turns] == ['user', 'context', 'assistant']
    assert sum(map(bool, kept)) == N_TEST
# %% [markdown] lang=en
# ## A model that only continues
#
# The **base model** (基座模型) learns from passages alone, without any question. First its tokenizer and its data
# (chapter 6 explains these commands), then a short training. The tokenizer does see questions, so that their characters
# become tokens; the model does not.
# %% [markdown] lang=zh
# ## 只会续写的模型
#
# 先训练一个**基座模型**（base model）：只读短文，一个问题也没见过。先做分词器和数据（这些命令第六章讲过），再训练一小会儿。
# 分词器倒是读过问题，不然问句里的字就没有自己的词元；模型没有读过。
# %%
passages = [''.join(describe(new_person(name)) for name in draw.sample(NAMES, 2)) for _ in range(N_TRAIN)]
(HERE / 'passages.txt').write_text('\n\n'.join(passages), encoding='utf-8')
questions = [QUESTION[draw.choice(list(FACTS))].format(draw.choice(NAMES)) for _ in range(N_TRAIN)]
(HERE / 'questions.txt').write_text('\n'.join(questions), encoding='utf-8')
run('-m', 'corpus.train_tokenizer', 'train', '--input', HERE / 'passages.txt', HERE / 'questions.txt', '--vocab_size=600',
    f'--out={HERE}/tokenizer')
run('-m', 'corpus.pack', 'build', '--input', HERE / 'passages.txt', '--format=paragraphs',
    f'--tokenizer={HERE}/tokenizer', f'--out={HERE}/passages', n_lines=2)
SHAPE = ['--block_size=96', '--n_layer=3', '--n_head=4', '--n_embd=96']
if SMALL:
    SHAPE = ['--block_size=96', '--n_layer=2', '--n_head=2', '--n_embd=64']
BASE_ITERS = 60 if SMALL else 200
output = run('train.py', 'config/train_chinese.py', f'--dataset={HERE}/passages', f'--out_dir={HERE}/base', *SHAPE,
             f'--max_iters={BASE_ITERS}', f'--eval_interval={BASE_ITERS}', '--report=False', n_lines=2)
# %% [markdown] lang=en
# Let it continue a beginning. It has learned the form of these sentences.
# %% [markdown] lang=zh
# 给它一个开头，让它往下写。句子的样子它已经学会了。
# %%
output = run('sample.py', f'--out_dir={HERE}/base', '--start=李小云住在', '--num_samples=3', '--max_new_tokens=24')
assert '李小云住在' in output
# %% [markdown] lang=en
# ## From turns to tokens
#
# A model sees one row of tokens. A **template** (模板) writes the turns into that row and marks who speaks by
# special tokens, which no text can contain by accident. The style `chat` looks like this:
#
# ```
# <|user|> question, empty line, passage <|assistant|> answer <|endoftext|>
# ```
#
# Beside the tokens stands the **mask** (掩码): 1 for tokens that the model shall learn to write, 0 for the rest. Nobody
# wants it to learn to ask, so the question and the passage get 0. The answer gets 1, and so does `<|endoftext|>`, because
# the model also has to learn when to stop.
#
# Let us build both by hand, and compare with `corpus/template.py`.
# %% [markdown] lang=zh
# ## 从轮次到词元
#
# 模型看到的只是一行词元。**模板**（template）把各轮文字写成一行，并用特殊词元标明是谁在说话；
# 特殊词元不会在普通文字里碰巧出现。`chat` 模板是这样的：
#
# ```
# <|user|> 问题、空行、短文 <|assistant|> 答案 <|endoftext|>
# ```
#
# 和词元并排的是**掩码**（mask）：要模型学着写的词元是 1，其余是 0。我们不想让它学提问，所以问题和短文都是 0；
# 答案是 1，结尾的 `<|endoftext|>` 也是 1，因为模型还得学会什么时候停笔。
#
# 我们亲手拼一遍，再和 `corpus/template.py` 的结果对照。
# %%
tokenizer = load_tokenizer(tokenizer_meta(f'{HERE}/tokenizer'))
(_, question), (_, passage), (_, answer) = turns
special = tokenizer.special
prompt = [special['<|user|>'], *tokenizer.encode(f'{question}\n\n{passage}'), special['<|assistant|>']]
target = [*tokenizer.encode(answer), special['<|endoftext|>']]
ids = prompt + target
mask = [0] * len(prompt) + [1] * len(target)

assert Template(tokenizer, 'chat').encode(turns) == (ids, mask)
print(len(ids), 'tokens, of which', sum(mask), 'are targets')
# %%
GREY, GREEN, YELLOW = '#e4e4e4', '#8fd19e', '#ffe08a'


def draw_tokens(axes, pieces, colours, columns=70):
    """Write pieces of text into boxes, line by line."""
    x = y = 0
    for piece, colour in zip(labels(pieces), colours, strict=True):
        width = 1.3 + sum(0.8 if character.isascii() else 1.5 for character in piece)
        if x + width > columns:
            x, y = 0, y - 1
        axes.text(x, y, piece, va='center', fontsize=11, bbox=dict(facecolor=colour, edgecolor='white', pad=3))
        x += width
    axes.set(xlim=(0, columns), ylim=(y - 0.6, 0.6))
    axes.set_axis_off()


def pieces_of(ids):
    return [tokenizer.decode([int(i)]).replace('\n', '↵') for i in ids]


def colours_of(ids, mask):
    marks = set(special.values())
    colours = [GREEN if is_target else GREY for is_target in mask]
    return [YELLOW if i in marks and not is_target else colour for i, is_target, colour in zip(ids, mask, colours, strict=True)]


figure = picture(9, 2)
draw_tokens(figure.subplots(), pieces_of(ids), colours_of(ids, mask))
show(figure)
# %% [markdown] lang=en
# Each box is a token. Yellow: special tokens of the template. Grey: read, but not learned. **Green: the targets** (目标).
# A box with `�`, if there is one, holds a part of a character, as in chapter 1.
#
# ## From mask to labels
#
# At each position the model predicts the *next* token. So the **labels** (标签) are the row moved by one place to the left,
# and where the mask of that next token is 0, the label is −100, a number that the loss leaves out. Below, the upper line
# is the input `x`, the lower line the label `y` under each input.
# %% [markdown] lang=zh
# 一个方框是一个词元。黄色：模板的特殊词元；灰色：只读不学；**绿色：要学的目标**（target）。
# 如果有带 `�` 的方框，里面只装着半个字，第一章见过。
#
# ## 从掩码到标签
#
# 模型在每个位置上预测的是**下一个**词元。所以**标签**（label）就是把这一行往左挪一格；
# 如果下一个词元的掩码是 0，标签就写成 −100，计算损失时跳过它。下面每一列里，上面是输入 `x`，下面是对应的标签 `y`。
# %%
x = ids[:-1]
y = [token if is_target else IGNORE for token, is_target in zip(ids[1:], mask[1:], strict=True)]
tail = range(len(x) - 9, len(x))  # the last positions
figure = picture(9, 1.4)
axes = figure.subplots()
for column, i in enumerate(tail):
    label = '−100' if y[i] == IGNORE else pieces_of([y[i]])[0]
    rows = [(1, pieces_of([x[i]])[0], YELLOW if x[i] in special.values() else GREY),
            (0, label, 'white' if y[i] == IGNORE else GREEN)]
    for height, text, colour in rows:
        axes.text(column, height, labels([text])[0], ha='center', va='center', fontsize=10,
                  bbox=dict(facecolor=colour, edgecolor='#bbbbbb', pad=3))
axes.text(-1, 1, 'x', ha='center', va='center', fontsize=13)
axes.text(-1, 0, 'y', ha='center', va='center', fontsize=13)
axes.set(xlim=(-1.3, len(tail) - 0.4), ylim=(-0.5, 1.5))
axes.set_axis_off()
show(figure)
# %% [markdown] lang=en
# Note the yellow box `<|assistant|>`: under it stands the first label. After this token the model has to begin the answer.
#
# ## Packing conversations
#
# Conversations are short, rows are long, so several conversations share a row, and padding (填充) fills the rest. The
# commands are those for the real files. `show` prints rows with the targets between ⟦ and ⟧; in a terminal they are green.
# %% [markdown] lang=zh
# 请看黄色的 `<|assistant|>`：它下面是第一个真正的标签。也就是说，读到这个词元，模型就该开始回答了。
#
# ## 把对话排成行
#
# 对话短，一行长，所以几段对话合用一行，剩下的地方用填充（padding）补齐。下面的命令和处理真实文件时一样。
# `show` 把要学的部分放在 ⟦ 和 ⟧ 之间；在终端里则显示成绿色。
# %%
for name in ('webqa', 'dureader'):
    run(f'data/{name}/prepare.py', '--input', HERE / f'{name}.train.json', '--val', HERE / f'{name}.test.json',
        f'--tokenizer={HERE}/base/ckpt.pt', '--block_size=96', f'--out={HERE}/{name}')
output = run('-m', 'corpus.conversations', 'show', HERE / 'webqa', '--rows=1')
assert '⟦' in output
# %% [markdown] lang=en
# What training reads is exactly what we made by hand: labels where the mask is 1, −100 elsewhere.
# %% [markdown] lang=zh
# 训练时读到的，和我们亲手做的完全一样：掩码为 1 的地方有标签，其余都是 −100。
# %%
loader = Loader(f'{HERE}/webqa', 'train', block_size=96, batch_size=4, order='sequential', isolate=True)
batch = loader.batch(0)
row = np.fromfile(HERE / 'webqa/train.bin', dtype=np.uint16)[:97].astype(int)
row_mask = np.fromfile(HERE / 'webqa/train.mask', dtype=np.uint8)[:97]
assert batch.x[0].tolist() == row[:-1].tolist()
assert batch.y[0].tolist() == np.where(row_mask[1:] == 1, row[1:], IGNORE).tolist()
print('targets in the first row:', int((batch.y[0] != IGNORE).sum()), 'of', batch.y.shape[1])
print('conversation of each token:', batch.documents[0].tolist())
# %% [markdown] lang=en
# The numbers in the last line keep neighbours apart: with `isolate_documents=True`, as in
# `config/finetune_small.py`, a token attends only to tokens of its own conversation. Otherwise the model could look
# for the answer in the passage of another question.
#
# ## Before
#
# `sample.py --prompts` answers each question of a file and counts the answers that are **exactly** (逐字相同) one of
# the expected ones. Temperature 0 always takes the most likely token, so the answers do not depend on chance.
# %% [markdown] lang=zh
# 最后一行的编号用来隔开邻居：`config/finetune_small.py` 里设了 `isolate_documents=True`，一个词元只看得见自己那段对话。
# 不然的话，模型可能跑到别的问题的短文里去找答案。
#
# ## 微调之前
#
# `sample.py --prompts` 回答文件里的每个问题，并统计有多少回答和标准答案**逐字相同**（exact match）。
# 温度为 0 时总取概率最大的词元，所以结果不靠运气。
# %%
def ask(model, name):
    """Return the answers of a model to the test file, a dict each."""
    path = HERE / f'{model}-{name}.jsonl'
    run('sample.py', f'--out_dir={HERE}/{model}', f'--prompts={HERE}/{name}.test.json', f'--answers={path}',
        '--style=chat', '--temperature=0', '--max_new_tokens=16', n_lines=1)
    lines = [json.loads(line) for line in path.read_text(encoding='utf-8').splitlines()]
    return [line for line in lines if 'expected' in line]  # passages without an answer have none


def share_exact(answers):
    return sum(line['exact'] for line in answers) / len(answers)


before = {name: ask('base', name) for name in ('webqa', 'dureader')}
print(before['webqa'][0])
# %% [markdown] lang=en
# The base model has never seen `<|assistant|>`, and writes whatever comes to its mind.
#
# ## Fine-tuning
#
# Same program, same loss, only other data, and weights that are not random: `--init_from`. The mixture takes half of each
# step from each data set.
# %% [markdown] lang=zh
# 基座模型从没见过 `<|assistant|>`，想到什么就写什么。
#
# ## 微调
#
# 还是同一个程序、同一个损失，只是换了数据，权重也不再从随机数开始（`--init_from`）。两个数据集各占一半。
# %%
TUNE_ITERS = 250 if SMALL else 300
TUNING = ['config/finetune_small.py', f'--init_from={HERE}/base/ckpt.pt', f'--max_iters={TUNE_ITERS}',
          '--batch_size=16', '--gradient_accumulation_steps=1', '--warmup_iters=0', '--auto_resume=False',
          f'--eval_interval={TUNE_ITERS // 6}', f'--checkpoint_interval={TUNE_ITERS}', '--generate_interval=0',
          '--keep_last_n_checkpoints=0', '--report=False']
output = run('train.py', *TUNING, f'--dataset={HERE}/webqa:0.5,{HERE}/dureader:0.5', f'--out_dir={HERE}/tuned', n_lines=2)
after = {name: ask('tuned', name) for name in ('webqa', 'dureader')}
for name in ('webqa', 'dureader'):
    print(f'{name}: exact {share_exact(before[name]):.1%} before, {share_exact(after[name]):.1%} after')
assert share_exact(after['webqa']) > share_exact(before['webqa']) + (0.02 if SMALL else 0.3)
# %%
metrics = [json.loads(line) for line in (HERE / 'tuned/metrics.jsonl').read_text().splitlines()]
evaluations = [line for line in metrics if 'val_loss' in line]
figure = picture(9, 3)
left, right = figure.subplots(1, 2)
left.plot([line['iter'] for line in evaluations], [line['val_loss'] for line in evaluations], marker='o', color=COLOURS[0])
left.set(xlabel='step of fine-tuning', ylabel='loss on answers (test files)', ylim=(0, None))
for number, (title, answers) in enumerate([('before', before), ('after', after)]):
    heights = [100 * share_exact(answers[name]) for name in ('webqa', 'dureader')]
    bars = right.bar([i + 0.4 * number for i in range(2)], heights, width=0.38, label=title, color=COLOURS[number])
    right.bar_label(bars, fmt='%.0f%%')
right.set_xticks([0.2, 1.2], ['WebQA\none person', 'DuReader\ntwo people'])
right.set(ylabel='exact answers in %', ylim=(0, 112))
right.legend(frameon=False, loc='upper right')
show(figure)
# %% [markdown] lang=en
# ## Read the wrong answers
#
# A number hides the reason. Always look at mistakes; here at those where the paragraph is about two people. Is the fact in a wrong answer
# that of the other person, or does it stand nowhere in the paragraph?
# %% [markdown] lang=zh
# ## 看看错在哪里
#
# 光看数字不知道原因，一定要翻一翻错题。这里看短文里有两个人的那些：
# 答案里的事实，是另一个人的，还是短文里根本没有？
# %%
wrong = [line for line in after['dureader'] if not line['exact']]
for line in wrong[:3]:
    print(line['question'].replace('\n\n', ' '), '->', line['answer'], '| expected:', line['expected'][0])


def kind_of(line):
    """Tell an exact answer from a well-formed sentence with a wrong fact, and from anything else."""
    if line['exact']:
        return 'exact'
    name, statement = line['question'][:3], line['answer'][3:].rstrip('。')
    verbs = [pattern.format('') for pattern in STATEMENT.values()]
    if not line['answer'].startswith(name) or not any(statement.startswith(verb) for verb in verbs):
        return 'anything else'
    return "the other person's fact" if statement in line['question'] else 'a fact of neither'


kinds = [kind_of(line) for line in after['dureader']]
for kind in ('exact', "the other person's fact", 'a fact of neither', 'anything else'):
    print(f'{kind:24} {kinds.count(kind) / len(kinds):.0%}')
# %% [markdown] lang=en
# In this short time the model has learned when it is its turn, what kind of thing is asked for, and, where the passage is about one
# person, mostly to copy it from there. Where the paragraph is about two people, nearly all of its answers have the right form, the
# name included, but the fact is often guessed. Telling *whose* fact it is takes two steps of looking (find the name, then the
# fact beside it), and models learn it later. An answer that sounds right and is wrong is the typical mistake of language models, large
# ones too. More steps, more layers and more data help.
#
# ## Where to go on
#
# - `corpus/dialogue.py`: all the formats that are read, and what happens to content that no format has.
# - `corpus/template.py`: templates, and how a long passage is cut without losing its answer.
# - `python chat.py --out_dir=lessons/work/ch07/tuned` talks to the model of this chapter.
# %% [markdown] lang=zh
# 短短一会儿，模型学会了什么时候轮到自己说话、问的是哪一类事情；短文里只有一个人时，它多半能把答案抄出来。
# 短文里有两个人时，回答的样子几乎都对，名字也对，内容却常常是猜的。要分清这件事**是谁的**，得查两次
# （先找到名字，再找名字旁边的事实），模型学得比较晚。听上去很像那么回事，其实是错的——这正是语言模型的典型毛病，大模型也一样。
# 多训练几步、多加几层、多给数据，都会有帮助。
#
# ## 接着读什么
#
# - `corpus/dialogue.py`：能读哪些格式，遇到哪种格式都没有的内容怎么办。
# - `corpus/template.py`：各种模板，以及怎样截短很长的短文而不丢掉答案。
# - `python chat.py --out_dir=lessons/work/ch07/tuned`：和本章训练的模型聊一聊。
# %% [markdown] lang=en
# ## Exercises
#
# 1. Does the model read? Give it the questions of the WebQA test file *without* passages and count the exact answers. How many
#    would it get by guessing?
# 2. DuReader items are sometimes passed on as a CSV table with the columns `question`, `answer` and `context`. Write the
#    training items in this form, pack the table, and show that the tokens and the mask are the same byte for byte.
# 3. What would happen if every token were a target? Compute, from the mask of the WebQA rows, which share of the loss
#    would come from questions and passages.
#
# <details><summary>Solutions in words</summary>
#
# 1. Without passages only guessing is left. Each fact has ten possible values, so about one in ten is right. The rest of its
#    score comes from reading.
# 2. The tokens are equal, because both files become the same turns, and from there on everything is the same. The table cannot
#    express several answers and marked paragraphs; choosing them is done before it is written.
# 3. About four fifths of the tokens that are not padding. The model would spend its effort on learning to write questions and
#    passages about people who do not exist, and the answers would be a small part of its loss.
# </details>
# %% [markdown] lang=zh
# ## 练习
#
# 1. 模型真的在读短文吗？把 WebQA 测试题里的短文**去掉**再问一遍，数一数有多少逐字答对。瞎猜能答对多少？
# 2. DuReader 的题目有时会整理成 CSV 表格，列名是 `question`、`answer`、`context`。把训练题写成这样的表格，
#    打包之后证明词元和掩码逐字节相同。
# 3. 如果每个词元都算目标，会怎样？根据 WebQA 各行的掩码，算一算有多大比例的损失会来自问题和短文。
#
# <details><summary>答案（文字）</summary>
#
# 1. 没有短文就只能猜。每种事实有十个可能的值，所以大约十题能蒙对一题。多出来的分数都是读出来的。
# 2. 完全相同，因为两种文件变成了同样的轮次，往后的步骤就都一样。表格装不下多个答案和段落标记，所以写表之前就要选好。
# 3. 除去填充，大约五分之四。模型会把力气花在学写问题和短文上，而那些人根本不存在；答案在损失里只占一小部分。
# </details>
# %% solution
questions = [answered(conversation.turns) for conversation in read_conversations([HERE / 'webqa.test.json'])]
lines = [json.dumps({'question': turns[0][1], 'answer': turns[2][1]}, ensure_ascii=False) + '\n' for turns in questions if turns]
(HERE / 'blind.test.json').write_text(''.join(lines), encoding='utf-8')
blind = share_exact(ask('tuned', 'blind'))
print(f'exact without passages {blind:.1%}, with passages {share_exact(after["webqa"]):.1%}, guessing about 10%')
assert blind < 0.3
# %% solution
import csv

with open(HERE / 'dureader.train.csv', 'w', encoding='utf-8', newline='') as file:
    table = csv.writer(file)
    table.writerow(['question', 'answer', 'context'])
    for conversation in read_conversations([HERE / 'dureader.train.json']):
        (_, question), (_, context), (_, answer) = conversation.turns
        table.writerow([question, answer, context])
run('data/dureader/prepare.py', '--input', HERE / 'dureader.train.csv', '--val', HERE / 'dureader.test.json',
    f'--tokenizer={HERE}/base/ckpt.pt', '--block_size=96', f'--out={HERE}/dureader-csv', n_lines=3)
for name in ('train.bin', 'train.mask'):
    assert (HERE / 'dureader' / name).read_bytes() == (HERE / 'dureader-csv' / name).read_bytes()
print('the same bytes')
# %% solution
all_ids = np.fromfile(HERE / 'webqa/train.bin', dtype=np.uint16)
all_masks = np.fromfile(HERE / 'webqa/train.mask', dtype=np.uint8)
is_padding = all_ids == tokenizer.pad
share = 1 - all_masks.sum() / (~is_padding).sum()
print(f'{share:.1%} of the tokens that are not padding belong to questions and passages')
assert share > 0.8
