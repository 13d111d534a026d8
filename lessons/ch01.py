# %% [markdown] lang=en
# # Chapter 1: from text to tokens
#
# A neural network computes with numbers, and a text is not made of numbers. This chapter turns text into
# *tokens* (词元): numbers that stand for pieces of text.
# %% [markdown] lang=zh
# # 第一章　从文本到词元
#
# 神经网络只会算数，而文本不是数。这一章讲怎样把文本变成**词元**（token）：
# 每个词元是一个整数，代表文本中的一小段。
# %%
import os
import sys
from pathlib import Path

# notebooks start in their own folder: go up to the repository's
os.chdir(next(folder for folder in (Path.cwd(), *Path.cwd().parents) if (folder / 'model.py').exists()))
sys.path.insert(0, '')

from lessons.helpers import chinese_text

text = chinese_text()
print(len(text), 'characters')
# %% [markdown] lang=en
# ## Exercises
#
# 1. How many different characters does the text have?
# 2. How many bytes does it take in UTF-8, for each character?
# 3. What are its five most frequent characters?
# %% [markdown] lang=zh
# ## 练习
#
# 1. 这份文本里有多少个不同的字？
# 2. 用 UTF-8 存储，平均每个字占多少字节？
# 3. 出现最多的五个字是哪些？
# %% solution
print(len(set(text)), 'different characters')
# %% solution
print(len(text.encode()) / len(text), 'bytes per character')
# %% solution
from collections import Counter

print(Counter(text).most_common(5))
