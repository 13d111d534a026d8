"""Shakespeare in GPT-2's tokens: the dataset to fine-tune GPT-2 on.

    python data/shakespeare/prepare.py

takes the text that data/shakespeare_char/prepare.py would take, but looks for input.txt in this folder. Tinyshakespeare makes
301,966 tokens for training and 36,059 for validation; the last tenth of the text is for validation, as in nanoGPT.
"""
import sys
from pathlib import Path

HERE = Path(__file__).resolve().parent
sys.path.insert(0, str(HERE.parent.parent))
from corpus.pack import write_dataset
from data.shakespeare_char.prepare import find_text
from files import one_line_errors
from tokens.tokenizer import GPT2Tokenizer

if __name__ == '__main__':
    with one_line_errors():
        tokenizer = GPT2Tokenizer()
        text, source = find_text(HERE)
        n_train = int(len(text) * 0.9)
        write_dataset(HERE, tokenizer, {'train': [text[:n_train]], 'val': [text[n_train:]]}, source)
