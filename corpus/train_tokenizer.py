"""Train a byte-level BPE on text, or compare how well tokenizers compress a text.

    python -m corpus.train_tokenizer train --input novels/ --vocab_size=16384 --out=data/tokenizers/zh
    python -m corpus.train_tokenizer compare --input wiki.txt --tokenizers gpt2 byte data/tokenizers/zh

The same text gives the same tokenizer, for any order of its files and any number of threads.
"""
import heapq
import json
import sys
from pathlib import Path

from corpus.encode import hash_of
from corpus.options import READING, Parser, count, read_files, run_command
from corpus.readers import find_files
from files import one_line_errors, write_atomically, write_json
from tokens.tokenizer import BPE_PATTERN, SPECIAL_TOKENS, BPETokenizer, load_tokenizer, tokenizer_meta
from tokens.tokenizer_json import byte_characters, tokenizer_config

SAMPLE_BYTES = 20_000_000  # the trainer takes about 85 bytes of memory for each byte of Chinese
COMPARED_BYTES = 10_000_000
PIECE_CHARS = 1 << 14


def train_bpe(texts, vocab_size, max_bytes=SAMPLE_BYTES):
    """Train a BPETokenizer of vocab_size tokens, special ones included, on a sample of at most max_bytes.

    It has fewer tokens if fewer pairs occur twice.
    """
    from tokenizers import Regex, Tokenizer, models, pre_tokenizers, trainers
    n_there = 256 + len(SPECIAL_TOKENS)
    if vocab_size <= n_there:
        raise ValueError(f'--vocab_size={vocab_size}: accepted are {n_there + 1} or more, for the bytes and '
                         f'special tokens are {n_there}')
    engine = Tokenizer(models.BPE())
    engine.pre_tokenizer = pre_tokenizers.Sequence([
        pre_tokenizers.Split(Regex(BPE_PATTERN), 'isolated'),
        pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)])
    trainer = trainers.BpeTrainer(vocab_size=vocab_size - len(SPECIAL_TOKENS), min_frequency=2,
                                  initial_alphabet=list(byte_characters()), show_progress=sys.stderr.isatty())
    sample = sample_pieces(texts, max_bytes)
    engine.train_from_iterator(sample, trainer, length=len(sample))
    merges = [' '.join(pair) for pair in json.loads(engine.to_str())['model']['merges']]
    if not merges:
        raise ValueError('no pair of characters occurs twice in the text: give more text')
    if n_there + len(merges) < vocab_size:
        print(f'the text has too few pairs that occur twice for {vocab_size:,} tokens')
    return BPETokenizer('\n'.join(merges))


def sample_pieces(texts, max_bytes):
    """Return the pieces of the texts with the lowest hashes, at most max_bytes together, ordered by hash."""
    kept, n_bytes = [], 0
    for text in texts:
        for start in range(0, len(text), PIECE_CHARS):
            data = text[start:start + PIECE_CHARS].encode('utf-8')
            heapq.heappush(kept, (-hash_of(data), data))
            n_bytes += len(data)
            while n_bytes > max_bytes and len(kept) > 1:
                n_bytes -= len(heapq.heappop(kept)[1])
    return [data.decode('utf-8') for _, data in sorted(kept, reverse=True)]


def save_tokenizer(tokenizer, folder):
    """Write the files that transformers and this project read, tokenizer.json last."""
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    content = tokenizer.tokenizer_json()
    merges = '\n'.join(['#version: 0.2', *content['model']['merges'], ''])
    write_json(folder / 'vocab.json', content['model']['vocab'], indent=None)
    write_atomically(folder / 'merges.txt', lambda f: f.write(merges.encode('utf-8')))
    write_json(folder / 'tokenizer_config.json', tokenizer_config(tokenizer), indent=2)
    write_json(folder / 'tokenizer.json', content, indent=None)


def read_texts(args):
    """Yield the documents of args.input."""
    files = find_files(args.input, args.format)
    if any(file.format == 'blocks' for file in files):
        raise ValueError(f'{" ".join(args.input)}: blocks hold token ids, not text')
    return (document.text for document in read_files(files, args))


def train(argv):
    """Train a byte-level BPE on text."""
    parser = Parser(train.__doc__, 'python -m corpus.train_tokenizer train', READING)
    parser.add_argument('--vocab_size', type=count, default=16384, help='number of tokens, special ones too')
    parser.add_argument('--out', required=True, help='folder, such as data/tokenizers/mine')
    args = parser.parse_args(argv)
    tokenizer = train_bpe(read_texts(args), args.vocab_size)
    save_tokenizer(tokenizer, args.out)
    print(f'{args.out}: {tokenizer.vocab_size:,} tokens, of which {len(tokenizer.special)} special')


def compare(argv):
    """Compare how well tokenizers compress a text."""
    parser = Parser(compare.__doc__, 'python -m corpus.train_tokenizer compare', [*READING, 'eot'])
    parser.add_argument('--tokenizers', nargs='+', default=['gpt2', 'byte'], metavar='NAME',
                        help='gpt2, byte, or folders with tokenizer.json')
    args = parser.parse_args(argv)
    tokenizers = {name: load_tokenizer(tokenizer_meta(name, eot=args.eot)) for name in args.tokenizers}
    texts, n_bytes = [], 0
    for text in read_texts(args):
        texts.append(text)
        n_bytes += len(text.encode('utf-8', 'replace'))
        if n_bytes >= COMPARED_BYTES:
            break
    n_chars, width = sum(map(len, texts)), max(map(len, tokenizers))
    if not n_chars:
        raise ValueError(f'{" ".join(args.input)}: no text in there')
    print(f'{n_chars:,} characters, {n_bytes:,} bytes')
    print(f'{"":{width}}  vocabulary      tokens  characters/token  bytes/token')
    for name, tokenizer in tokenizers.items():
        n_tokens = sum(len(ids) for ids in tokenizer.encode_batch(texts))
        print(f'{name:{width}}  {tokenizer.vocab_size:10,}  {n_tokens:10,}  {n_chars / n_tokens:16.3f}  '
              f'{n_bytes / n_tokens:11.3f}')


if __name__ == '__main__':
    with one_line_errors():
        run_command(__doc__, {'train': train, 'compare': compare})
