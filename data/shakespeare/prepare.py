"""Shakespeare in GPT-2's tokens: the dataset to fine-tune GPT-2 on.

    python data/shakespeare/prepare.py

takes the text of data/shakespeare_char/prepare.py: tinyshakespeare has 301,966 tokens for training and 36,059
for validation, as in nanoGPT.
"""
import sys
from pathlib import Path

HERE = Path(__file__).resolve().parent
sys.path.insert(0, str(HERE.parent.parent))
from data.shakespeare_char.prepare import prepare
from files import one_line_errors

if __name__ == '__main__':
    with one_line_errors():
        prepare(HERE, __doc__, 'gpt2')
