"""FineWeb, filtered web text: its sample of about 10 billion GPT-2 tokens, in 14.9 million documents.

    python data/fineweb/prepare.py                      # streams 31 GB of Parquet from the Hugging Face hub
    python data/fineweb/prepare.py --max_docs=20000     # a first try
    python data/fineweb/prepare.py --input parquet/     # from local files

writes 20 GB: train_000000.bin and so on with 100M tokens each, and one document in 2000 to val_000000.bin.
llm.c takes the first 100M tokens for validation instead, so losses compare only roughly. The same command
continues a killed run. HF_ENDPOINT (a mirror) and HF_HUB_OFFLINE are honoured.
"""
import sys
from pathlib import Path

HERE = Path(__file__).resolve().parent
sys.path.insert(0, str(HERE.parent.parent))
from corpus.pack import prepare_parquet
from files import one_line_errors

REPO = 'HuggingFaceFW/fineweb'
REVISION = '9bb295ddab0e05d785b879661af7260fed5140fc'  # its tag v1.4.0
FOLDER = 'sample/10BT'

if __name__ == '__main__':
    with one_line_errors():
        prepare_parquet(HERE, __doc__, REPO, REVISION, FOLDER)
