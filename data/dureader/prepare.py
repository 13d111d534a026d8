"""DuReader: questions of Chinese web users, answered by people (arXiv:1711.05073).

    python data/dureader/prepare.py --input=dureader.csv --tokenizer=data/tokenizers/zh --block_size=512
    python data/dureader/prepare.py --input zhidao.train.json search.train.json --val zhidao.dev.json

A CSV file has the columns question, answer and perhaps context. The JSONL files of DuReader 2.0 are read as
they are, with the first of several answers, and as its passage the paragraph that the preprocessed files
mark as most related. Baidu gives the files on request.
"""
import sys
from pathlib import Path

HERE = Path(__file__).resolve().parent
sys.path.insert(0, str(HERE.parent.parent))
from corpus.conversations import build_command
from files import one_line_errors

if __name__ == '__main__':
    with one_line_errors():
        build_command(None, __doc__, HERE)
