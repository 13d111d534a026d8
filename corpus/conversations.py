"""Pack conversations into rows of tokens with a loss mask.

    python -m corpus.conversations build --input=chats.jsonl --tokenizer=out/ckpt.pt --out=data/chats
    python -m corpus.conversations build --input=qa.csv --question=问题 --answer=答案 --out=data/qa
    python -m corpus.conversations show data/chats

corpus/dialogue.py says which files and fields are read, corpus/template.py how turns become tokens. A row
is block_size + 1 tokens: whole conversations, then padding. The mask is 1 on answers and their end-of-text,
else 0.
"""

import sys
from bisect import bisect_left, insort
from collections import Counter
from itertools import chain, groupby
from pathlib import Path

import numpy as np
from tqdm import tqdm

if __name__ == '__main__':
    sys.path[0] = str(Path(__file__).resolve().parents[1])
from corpus import dialogue
from corpus.dialogue import answered, read_conversations
from corpus.encode import split_by_hash
from corpus.options import Parser, print_next
from corpus.template import STYLES, check_tokenizer, encode
from corpus.writer import Piece, writing
from files import one_line_errors
from tokens.dataset import read_meta
from tokens.tokenizer import load_tokenizer, tokenizer_meta

MAX_EVIDENCE_LOST = 0.05
EVIDENCE_LOST = 'answer no longer in its passage'


def build(folder, tokenizer, paths, *, block_size, style='chat', val=0.05, verbose=False, **reading) -> dict:
    """Pack conversations into a dataset folder, replacing the dataset that was there.

    block_size  a row is one token longer; training takes the same block_size
    val         share of the questions (or of their passages) for validation, chosen by hash: conversations
                about one of them are in one split. Or a list of files, whose questions training leaves out
    reading     question, answer, encoding of corpus.dialogue.read_conversations
    returns     the dict in meta.json
    raises      ValueError, FileNotFoundError; the old dataset then stays
    """
    check_tokenizer(tokenizer)
    if isinstance(val, float) and not 0 < val < 1:
        raise ValueError(f'--val_fraction={val} must lie between 0 and 1')
    encoder = Encoder(tokenizer, style, block_size + 1, verbose)
    splits = {'train': [], 'val': []}
    if isinstance(val, float):
        for key, conversations in encoder.encode_all(read_conversations(paths, **reading)).items():
            splits[split_by_hash(key, val)] += conversations
    else:
        held_out = encoder.encode_all(read_conversations(val, **reading))
        encoded = encoder.encode_all(read_conversations(paths, **reading))
        n_held_out = sum(len(encoded.pop(key, ())) for key in held_out)
        if n_held_out:
            print(f'{n_held_out:,} about what the validation files ask, left out of training')
        splits = {'train': list(chain(*encoded.values())), 'val': list(chain(*held_out.values()))}
    remedies = {'train': 'give more, or a larger --block_size',
                'val': 'give --val FILE, or another --val_fraction'}
    for name, conversations in splits.items():
        if not conversations:
            raise ValueError(f'there is no conversation for the {name} split: {remedies[name]}')
    return write_dataset(Path(folder), tokenizer, splits, style=style, size=block_size + 1,
                         source=', '.join(Path(path).name for path in paths))


class Encoder:
    """Conversations to (ids, mask), and counts of those that were left out or cut."""

    def __init__(self, tokenizer, style, size, verbose):
        self.tokenizer, self.style, self.size, self.verbose = tokenizer, style, size, verbose

    def encode_all(self, conversations):
        """Return {key: list of (ids, mask)}, and print the counts."""
        encoded = {}
        self.counts, self.n_evidence = Counter(), 0
        for conversation in tqdm(conversations, desc='tokenizing', unit=' conversations', disable=None):
            fitted = self.encode(conversation.where, conversation.turns)
            if fitted is not None:
                encoded.setdefault(conversation.key, []).append((fitted.ids, fitted.mask))
        for event, n in self.counts.items():
            print(f'{event}: {n:,}' + ('' if self.verbose else ' (-v names them)'))
        share = self.counts[EVIDENCE_LOST] / max(self.n_evidence, 1)
        if share > MAX_EVIDENCE_LOST:
            print(f'warning: {share:.0%} of the answers are no longer in their passages, '
                  'so the model would learn to answer without them: use a larger --block_size')
        return encoded

    def encode(self, where, turns):
        """Return a conversation as Fitted, None if it was left out."""
        kept = answered(turns)
        if not kept:
            return self.count(where, 'left out, having no answer')
        if ('assistant', '') in turns:
            self.count(where, 'ended before an empty answer')
        fitted = encode(kept, self.tokenizer, self.style, self.size)
        if fitted is None:
            return self.count(where, 'left out, the answer alone being longer than a row')
        if fitted.n_left_out or fitted.n_cut:
            self.count(where, 'cut to fit a row')
        self.n_evidence += fitted.evidence is not None
        if fitted.evidence is False:
            self.count(where, EVIDENCE_LOST)
        return fitted

    def count(self, where, event):
        self.counts[event] += 1
        if self.verbose:
            tqdm.write(f'{where}: {event}')


# -----------------------------------------------------------------------------
# rows


def best_fit(lengths, size):
    """Group conversations of these lengths into rows of at most `size` tokens, lists of numbers.

    Longest first, each into the row where it leaves the least room: best-fit decreasing, arXiv:2404.10830.
    """
    rows, rooms = [], []  # rooms: (tokens free, row), sorted
    for i in sorted(range(len(lengths)), key=lambda i: -lengths[i]):
        at = bisect_left(rooms, (lengths[i],))
        if at < len(rooms):
            room, row = rooms.pop(at)
        else:
            room, row = size, len(rows)
            rows.append([])
        rows[row].append(i)
        if room > lengths[i]:
            insort(rooms, (room - lengths[i], row))
    return sorted(sorted(row) for row in rows)


def write_dataset(folder, tokenizer, splits, *, style, size, source):
    """Write the splits, {name: list of (ids, mask)}. Returns the dict in meta.json."""
    with writing(folder, tokenizer, list(splits), masked=True) as writer:
        for name, conversations in splits.items():
            write_rows(writer, name, conversations, size)
        meta = writer.publish(source, row_tokens=size, style=style)
    for name, entry in meta['splits'].items():
        n_targets = sum(int(mask.sum()) for _, mask in splits[name])
        n_used = sum(len(ids) for ids, _ in splits[name])
        n_tokens = entry['tokens']
        print(f'{folder.resolve().name}/{name}: conversations: {entry["documents"]:,}, '
              f'in {n_tokens // size:,} rows of {size:,} tokens; '
              f'{n_targets:,} targets ({n_targets / n_tokens:.1%}), {1 - n_used / n_tokens:.1%} padding')
    return meta


def write_rows(writer, name, encoded, size):
    """Write the rows of a split."""
    token_bytes, pad = writer.tokenizer.token_bytes(), writer.tokenizer.pad
    for row in best_fit([len(ids) for ids, _ in encoded], size):
        pieces = []
        for ids, mask in (encoded[i] for i in row):
            pieces.append(Piece(ids, mask, int(token_bytes[ids].sum())))
        n_pad = size - sum(len(piece.ids) for piece in pieces)
        writer.append(name, [*pieces, Piece(np.full(n_pad, pad), np.zeros(n_pad))])


# -----------------------------------------------------------------------------
# rows for people


def as_text(ids, mask, tokenizer, colour):
    """Return a row as text: targets in green, or between ⟦ and ⟧, and special tokens by name."""
    names = {i: name for name, i in tokenizer.special.items()}
    begin, end = ('\x1b[32m', '\x1b[0m') if colour else ('⟦', '⟧')
    borders = np.flatnonzero(np.diff(mask, prepend=mask[0])).tolist()
    text = []
    for start, stop in zip([0, *borders], [*borders, len(ids)], strict=True):
        piece = ''
        for is_special, group in groupby(ids[start:stop].tolist(), names.__contains__):
            run = list(group)  # a character may be several tokens
            piece += ''.join(map(names.get, run)) if is_special else tokenizer.decode(run)
        text.append(f'{begin}{piece}{end}' if mask[start] else piece)
    return ''.join(text)


def show(folder, split='train', n_rows=3):
    """Print the first rows of a split."""
    folder = Path(folder)
    meta = read_meta(folder)
    if not meta.get('row_tokens') or split not in meta['splits'] or not (folder / f'{split}.mask').exists():
        raise ValueError(f'{folder} has no rows of conversations in a {split} split: '
                         'python -m corpus.conversations build makes them')
    tokenizer, size = load_tokenizer(meta['tokenizer']), meta['row_tokens']
    dtype = np.dtype(meta['dtype']).newbyteorder('<')
    ids = np.memmap(folder / f'{split}.bin', dtype, 'r').reshape(-1, size)
    mask = np.memmap(folder / f'{split}.mask', np.uint8, 'r').reshape(-1, size)
    index = np.fromfile(folder / f'{split}.idx', '<i8').reshape(-1, 2)
    for row in range(min(n_rows, len(ids))):
        spans = index[index[:, 0] // size == row]
        n_used = int(spans.sum(axis=1).max()) - row * size
        print(f'--- row {row} of {len(ids):,}: conversations: {len(spans)}, targets: {int(mask[row].sum())}, '
              f'padding: {size - n_used}')
        print(as_text(ids[row, :n_used], mask[row, :n_used], tokenizer, sys.stdout.isatty()))


# -----------------------------------------------------------------------------
# command line


def open_tokenizer(name):
    """Load gpt2, byte, or the tokenizer of a checkpoint, an out_dir, or a folder with tokenizer.json."""
    path = Path(name)
    if (path / 'ckpt.pt').exists():
        path = path / 'ckpt.pt'
    if path.suffix != '.pt':
        return load_tokenizer(tokenizer_meta(name))
    import checkpoint
    meta = checkpoint.read(path).get('tokenizer')
    if meta is None:
        raise ValueError(f'{path} does not name its tokenizer: use --tokenizer=gpt2 if its model is GPT-2')
    return load_tokenizer(meta)


def build_command(argv, doc=None, folder=None, download=None, style='chat'):
    """Pack conversations: build's command line, and that of the prepare scripts.

    doc, folder   docstring and folder of a prepare script, where its dataset goes by default
    download      function that returns the path of its file, where --input names none
    style         the default
    """
    command = None if doc else 'python -m corpus.conversations build'
    parser = Parser(doc or f'{__doc__}\n{dialogue.__doc__}', command)
    add = parser.add_argument
    add('--input', nargs='+', required=download is None, metavar='PATH', help='files and folders')
    add('--val', nargs='+', default=[], metavar='PATH', help='files for validation, instead of a share')
    add('--val_fraction', type=float, default=0.05, help='share for validation (default: %(default)s)')
    add('--question', default='', metavar='NAME', help='the column of the questions, if no layout has it')
    add('--answer', default='', metavar='NAME', help='the column of the answers')
    add('--encoding', default='utf-8', help='of text files: gb18030, big5, utf-16 ... (default: %(default)s)')
    add('--tokenizer', default='gpt2',
        help='gpt2, byte, a checkpoint, or a folder with tokenizer.json (default: %(default)s)')
    add('--block_size', type=int, default=1024,
        help='as in training; a row has one token more (default: %(default)s)')
    add('--style', choices=list(STYLES), default=style, help='prompt template (default: %(default)s)')
    add('--out', type=Path, default=folder, required=folder is None, help='dataset folder')
    add('-v', '--verbose', action='store_true', help='name each conversation that is left out or cut')
    args = parser.parse_args(argv)
    build(args.out, open_tokenizer(args.tokenizer), args.input or [download()], block_size=args.block_size,
          style=args.style, val=args.val or args.val_fraction, verbose=args.verbose,
          question=args.question, answer=args.answer, encoding=args.encoding)
    base = 'CHECKPOINT'
    if args.tokenizer == 'gpt2' or Path(args.tokenizer).suffix == '.pt':
        base = args.tokenizer
    print_next(args.out, ['config/finetune_dolly.py', f'--init_from={base}'], own_dataset='dolly')


def show_command(argv):
    parser = Parser('Print rows. Targets are green, or between ⟦ and ⟧ where there is no colour.',
                    'python -m corpus.conversations show')
    parser.add_argument('folder', type=Path)
    parser.add_argument('--split', choices=['train', 'val'], default='train')
    parser.add_argument('--rows', type=int, default=3, help='number of rows (default: %(default)s)')
    args = parser.parse_args(argv)
    show(args.folder, args.split, args.rows)


def main():
    commands = {'build': build_command, 'show': show_command}
    command = sys.argv[1] if len(sys.argv) > 1 else ''
    if command in ('', '-h', '--help'):
        print(f'{__doc__}\nbuild --help and show --help list the settings.')
        raise SystemExit(0 if command else 2)
    if command not in commands:
        raise ValueError(f'{command}: accepted are {", ".join(commands)}')
    commands[command](sys.argv[2:])


if __name__ == '__main__':
    with one_line_errors():
        main()
