"""WebQA: Chinese questions with passages from the web that answer them or not (arXiv:1607.06275).

    python data/webqa/prepare.py --input=me_train.json --val=me_validation.ann.json --block_size=512

Each passage that answers its question makes a conversation; those marked no_answer are left out and counted.
Baidu gives the files on request: {question id: {"question": text, "evidences": {id: {"answer": [text],
"evidence": text}}}}.
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
