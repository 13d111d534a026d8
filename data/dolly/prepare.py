"""Dolly-15k: 15,011 instructions with answers, written by the employees of Databricks (CC BY-SA 3.0).

    python data/dolly/prepare.py                                        # from the Hugging Face hub, for GPT-2
    python data/dolly/prepare.py --input=databricks-dolly-15k.jsonl     # a file on this disk
    python data/dolly/prepare.py --tokenizer=out/ckpt.pt --block_size=256   # for a model of your own

One instruction in twenty is for validation, chosen by hash. HF_ENDPOINT names a mirror of the hub.
"""
import os
import sys
from pathlib import Path

HERE = Path(__file__).resolve().parent
sys.path.insert(0, str(HERE.parent.parent))
from corpus.conversations import build_command
from corpus.fetch import fetch
from files import one_line_errors

HUB = os.environ.get('HF_ENDPOINT', '').rstrip('/') or 'https://huggingface.co'
REVISION = 'bdd27f4d94b9c1f951818a7da7fd7aeea5dbff1a'
FILE = 'databricks-dolly-15k.jsonl'
SHA256 = '2df9083338b4abd6bceb5635764dab5d833b393b55759dffb0959b6fcbf794ec'
ADDRESS = f'{HUB}/datasets/databricks/databricks-dolly-15k/resolve/{REVISION}/{FILE}'


def download():
    return fetch(FILE, [ADDRESS], SHA256)


if __name__ == '__main__':
    with one_line_errors():
        build_command(None, __doc__, HERE, download, 'alpaca')
