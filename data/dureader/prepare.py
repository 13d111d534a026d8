"""DuReader: questions of Chinese web users, answered by people (arXiv:1711.05073).

    python data/dureader/prepare.py --input dureader.csv --tokenizer data/tokenizers/bytebpe_zh --block_size 512
    python data/dureader/prepare.py --input zhidao.train.json search.train.json --val zhidao.dev.json --tokenizer gpt2

A CSV file has a first line with the columns question, answer and, if there are passages, context; other columns are ignored. The
JSONL files of DuReader 2.0 are read as they are: of several answers the first is taken, and as context the paragraph that is marked
as most related, so take the preprocessed ones, which have these marks. Baidu gives the files on request: they have to be here already.
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
