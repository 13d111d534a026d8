"""OpenWebText, the open copy of GPT-2's training text: about 9 billion tokens in 8,013,769 documents.

    python data/openwebtext/prepare.py                  # streams 24 GB of Parquet from the Hugging Face hub
    python data/openwebtext/prepare.py --max_docs=20000 # a first try
    python data/openwebtext/prepare.py --input parquet/ # from local files

writes 18 GB: train_000000.bin and so on with 100M tokens each, and one document in 2000 to val_000000.bin.
The same command continues a killed run. HF_ENDPOINT (a mirror) and HF_HUB_OFFLINE are honoured.
"""
import sys
from pathlib import Path

HERE = Path(__file__).resolve().parent
sys.path.insert(0, str(HERE.parent.parent))
from corpus.pack import prepare_parquet
from files import one_line_errors

REPO = 'Skylion007/openwebtext'
REVISION = '79d93d786212f7344586290adb811d4ae6a1762c'  # Parquet, no script
FOLDER = 'plain_text'  # 80

if __name__ == '__main__':
    with one_line_errors():
        prepare_parquet(HERE, __doc__, REPO, REVISION, FOLDER)
