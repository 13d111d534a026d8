"""Pack conversations into rows of tokens with a loss mask.

    python -m corpus.conversations build --input=chats.jsonl --tokenizer=out/ckpt.pt --out=data/chats
    python -m corpus.conversations build --input=qa.csv --question=问题 --answer=答案 --out=data/qa
    python -m corpus.conversations show data/chats

A row is block_size + 1 tokens: whole conversations, then padding. The mask is 1 on answers and their ends.
"""

import sys
from bisect import bisect_left, insort
from collections import Counter
from itertools import chain, groupby
from operator import itemgetter
from pathlib import Path

import numpy as np
from tqdm import tqdm

if __name__ == '__main__':
    sys.path[0] = str(Path(__file__).resolve().parents[1])
from corpus import dialogue
from corpus.encode import split_by_hash
from corpus.options import Parser, count, print_next, run_command
from corpus.template import STYLES, Template
from corpus.writer import Piece, writing
from files import one_line_errors
from tokens.dataset import Split
from tokens.tokenizer import load_tokenizer, tokenizer_meta

EVIDENCE_LOST = 'answer no longer in its passage'
MAX_EVIDENCE_LOST = 0.05  # share of the answers, above which a warning is printed


def build(folder, tokenizer, paths, *, block_size, style='chat', val=0.05, verbose=False, **reading) -> dict:
    """Pack conversations into a dataset folder. Returns its meta.json.

    val       share of the questions or passages for validation, chosen by hash, or a list of files
    reading   question, answer, encoding of read_conversations
    """
    template, size = Template(tokenizer, style), block_size + 1
    encoded = encode_all(dialogue.read_conversations(paths, **reading), template, size, verbose)
    if isinstance(val, float):
        keys = [key for key in encoded if split_by_hash(key, val) == 'val']
        held_out = {key: encoded.pop(key) for key in keys}
    else:
        held_out = encode_all(dialogue.read_conversations(val, **reading), template, size, verbose)
        n_held_out = sum(len(encoded.pop(key, ())) for key in held_out)
        if n_held_out:
            print(f'{n_held_out:,} about what the validation files ask, left out of training')
    splits = {'train': list(chain(*encoded.values())), 'val': list(chain(*held_out.values()))}
    for name, remedy in (('train', 'give more, or a larger --block_size'),
                         ('val', 'give --val FILE, or another --val_fraction')):
        if not splits[name]:
            raise ValueError(f'there is no conversation for the {name} split: {remedy}')
    source = ', '.join(Path(path).name for path in paths)
    return write_dataset(Path(folder), tokenizer, splits, style=style, size=size, source=source)


def encode_all(conversations, template, size, verbose):
    """Encode conversations to {key: list of (ids, mask)}, and print how many were left out or cut."""
    encoded, counts, n_evidence = {}, Counter(), 0
    for where, turns, key in tqdm(conversations, desc='tokenizing', unit=' conversations', disable=None):
        kept = dialogue.answered(turns)
        fitted = kept and template.fit(kept, size)
        if fitted:
            encoded.setdefault(key, []).append((fitted.ids, fitted.mask))
            n_evidence += fitted.evidence is not None
        for event in events_of(turns, kept, fitted):
            counts[event] += 1
            if verbose:
                tqdm.write(f'{where}: {event}')

    for event, n in counts.items():
        print(f'{event}: {n:,}{" (-v names them)" * (not verbose)}')
    share = counts[EVIDENCE_LOST] / max(n_evidence, 1)
    if share > MAX_EVIDENCE_LOST:
        print(f'warning: {share:.0%} of the answers are no longer in their passages, '
              'so the model would learn to answer without them: use a larger --block_size')
    return encoded


def events_of(turns, kept, fitted):
    """Yield in words what became of a conversation."""
    if not kept:
        yield 'left out, having no answer'
        return
    if ('assistant', '') in turns:
        yield 'ended before an empty answer'
    if not fitted:
        yield 'left out, the answer alone being longer than a row'
        return
    if fitted.n_left_out or fitted.n_cut:
        yield 'cut to fit a row'
    if fitted.evidence is False:
        yield EVIDENCE_LOST


# -----------------------------------------------------------------------------
# rows


def best_fit(lengths, size):
    """Group conversations of these lengths into rows of at most `size` tokens, lists of numbers.

    Best-fit decreasing (arXiv:2404.10830): the longest first, each into the row that it fills best.
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
    token_bytes = tokenizer.token_bytes()
    with writing(folder, tokenizer, list(splits), masked=True) as writer:
        for name, conversations in splits.items():
            for row in best_fit([len(ids) for ids, _ in conversations], size):
                pieces = []
                for ids, mask in (conversations[i] for i in row):
                    pieces.append(Piece(ids, mask, int(token_bytes[ids].sum())))
                n_pad = size - sum(len(piece.ids) for piece in pieces)
                writer.append(name, [*pieces, Piece(np.full(n_pad, tokenizer.pad), np.zeros(n_pad))])
        meta = writer.publish(source, row_tokens=size, style=style)
    for name, conversations in splits.items():
        n_targets = sum(int(mask.sum()) for _, mask in conversations)
        n_used = sum(len(ids) for ids, _ in conversations)
        n_tokens = meta['splits'][name]['tokens']
        print(f'{folder.resolve().name}/{name}: conversations: {len(conversations):,}, '
              f'in {n_tokens // size:,} rows of {size:,} tokens; '
              f'{n_targets:,} targets ({n_targets / n_tokens:.1%}), {1 - n_used / n_tokens:.1%} padding')
    return meta


# -----------------------------------------------------------------------------
# rows for people


def as_text(ids, mask, tokenizer, colour):
    """Return a row as text: targets in green, or between ⟦ and ⟧, and special tokens by name."""
    begin, end = '⟦⟧'
    if colour:
        begin, end = '\x1b[32m', '\x1b[0m'
    text = ''
    for is_target, tokens in groupby(zip(ids, mask, strict=True), key=itemgetter(1)):
        part = tokenizer.decode([token for token, _ in tokens])
        if is_target:
            part = begin + part + end
        text += part
    return text


def show(folder, split='train', n_rows=3):
    """Print the first rows of a split."""
    data = Split(folder, split)
    size = data.row_tokens
    if not size:
        raise ValueError(f'{folder} has no rows of conversations: '
                         'python -m corpus.conversations build makes them')
    tokenizer = load_tokenizer(data.tokenizer_meta)
    for row in range(min(n_rows, data.n_tokens // size)):
        ids, mask = data.shards[0][row * size:(row + 1) * size], data.mask[row * size:(row + 1) * size]
        n_used = np.flatnonzero(mask)[-1] + 1  # the end of the last answer; padding follows
        print(f'--- row {row} of {data.n_tokens // size:,}: targets: {mask.sum()}, padding: {size - n_used}')
        print(as_text(ids[:n_used], mask[:n_used], tokenizer, sys.stdout.isatty()))


# -----------------------------------------------------------------------------
# command line


def open_tokenizer(name):
    """Load gpt2, byte, or the tokenizer of a checkpoint, an out_dir, or a folder with tokenizer.json."""
    from weights.begin import find_start  # imports torch
    if name.endswith('.pt'):
        return find_start(checkpoint_path=name).tokenizer
    if (Path(name) / 'ckpt.pt').exists():
        return find_start(out_dir=name).tokenizer
    return load_tokenizer(tokenizer_meta(name))


def build_command(argv, doc=None, folder=None, download=None, style='chat'):
    """Pack conversations: build's command line, and that of the prepare scripts.

    doc, folder   of a prepare script
    download      returns the path of its file, where --input names none
    """
    defaults, command = {'val_fraction': 0.05}, None
    if download:
        defaults['input'] = None
    if folder:
        defaults['out'] = folder
    if not doc:
        table = '\n'.join(f'    {use:15}{", ".join(names)}' for use, names in dialogue.FIELDS.items())
        doc, command = f'{__doc__}\n{dialogue.__doc__}\n{table}', 'python -m corpus.conversations build'
    parser = Parser(doc, command, ['input', 'val_fraction', 'encoding', 'out'], **defaults)
    add = parser.add_argument
    add('--val', nargs='+', metavar='PATH', help='files for validation, instead of a share')
    add('--question', default='', metavar='NAME', help='the column of the questions, if no layout has it')
    add('--answer', default='', metavar='NAME', help='the column of the answers')
    add('--tokenizer', default='gpt2', help='gpt2, byte, a checkpoint, or a folder with tokenizer.json')
    add('--block_size', type=count, default=1024, help='as in training; a row has one token more')
    add('--style', choices=list(STYLES), default=style, help='prompt template')
    add('-v', '--verbose', action='store_true', help='name each conversation that is left out or cut')
    args = parser.parse_args(argv)
    build(args.out, open_tokenizer(args.tokenizer), args.input or [download()], block_size=args.block_size,
          style=args.style, val=args.val or args.val_fraction, verbose=args.verbose,
          question=args.question, answer=args.answer, encoding=args.encoding)
    base, config = 'CHECKPOINT', 'config/finetune_small.py'
    if args.tokenizer.endswith('.pt'):
        base = args.tokenizer
    if args.tokenizer == 'gpt2':
        base, config = 'gpt2', 'config/finetune_dolly.py'
    if (Path(args.tokenizer) / 'config.json').is_file():  # the folder of a model
        base, config = args.tokenizer, 'config/finetune_qwen3.py'
    print_next(args.out, [config, f'--init_from={base}'], own_dataset='dolly')


def show_command(argv):
    parser = Parser('Print rows. Targets are green, or between ⟦ and ⟧ where there is no colour.',
                    'python -m corpus.conversations show')
    parser.add_argument('folder', type=Path)
    parser.add_argument('--split', choices=['train', 'val'], default='train')
    parser.add_argument('--rows', type=count, default=3, help='number of rows')
    args = parser.parse_args(argv)
    show(args.folder, args.split, args.rows)


if __name__ == '__main__':
    with one_line_errors():
        run_command(__doc__, {'build': build_command, 'show': show_command})
