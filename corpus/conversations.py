"""Conversations to rows of tokens with a loss mask, by the one template that sample.py --chat speaks, too.

    python -m corpus.conversations build --input dolly.jsonl --tokenizer gpt2 --block_size 1024 --style alpaca --out data/dolly
    python -m corpus.conversations build --input chats.jsonl --tokenizer out/ckpt.pt --block_size 256 --out data/chats
    python -m corpus.conversations show data/chats

Files are JSON, JSONL or CSV in UTF-8; which of these layouts one has shows in its fields:

    messages                              [{"role": "system" | "user" | "assistant", "content": text}, ...]
    instruction, response, [context]      Dolly-15k
    instruction, output, [input]          Alpaca
    question, evidences                   webQA: evidences {id: {"answer": [text], "evidence": text}}, "no_answer" is none
    question, documents, answers          DuReader 2.0: documents [{"paragraphs": [text], "is_selected", "most_related_para"}]
    paragraphs                            SQuAD, DuReader-robust, CMRC in SQuAD's form: [{"context", "qas": [{"question", "answers": [{"text"}]}]}]
    context_text, qas                     CMRC 2018: qas [{"query_text", "answers": [text]}]
    question, answer or answers, [context]  any table of questions, DuReader as CSV and SQuAD as the hub has it, {"text": [text]}, among them
    prompt, [response]                    one question, for sample.py --prompts

Style 'chat' opens each turn with its role token, <|user|> or <|assistant|>, or with a line such as '### User:' where the
tokenizer has none; 'alpaca' with '### Instruction:', '### Context:' and '### Response:'. An answer ends with end-of-text. Each text is
tokenized by itself, so that no token reaches from the prompt into the answer. A row is block_size + 1 tokens: whole
conversations, and padding behind them. The mask is 1 on the answers and their end-of-text, 0 on all else.

A turn is a pair (role, text) with the roles system, user, context, assistant; a conversation is a list of turns.
"""
import argparse
import csv
import io
import json
import shutil
import sys
from bisect import bisect_left, insort
from collections import Counter
from pathlib import Path

import numpy as np

if __name__ == '__main__':
    sys.path[0] = str(Path(__file__).resolve().parents[1])
from corpus.encode import split_by_hash
from corpus.options import dataset_name
from corpus.readers import read_text
from corpus.writer import SplitFiles, packing_folder, publish
from files import one_line_errors
from tokens.dataset import id_dtype, read_meta
from tokens.tokenizer import load_tokenizer, tokenizer_meta

# -----------------------------------------------------------------------------
# files to conversations

def records(path):
    """(where it stands, the record) of every record in a file of one of the layouts above."""
    text, suffix = read_text(path), Path(path).suffix.lower()
    if suffix in ('.csv', '.tsv'):
        csv.field_size_limit(1 << 30)
        for row in (table := csv.DictReader(io.StringIO(text, newline=''), delimiter='\t' if suffix == '.tsv' else ',')):
            if None in row or None in row.values():
                raise ValueError(f'{path}, line {table.line_num}: this row has not the {len(table.fieldnames)} fields of the first line')
            yield f'{path}, line {table.line_num}', row
        return
    try:
        found = json.loads(text)
    except (ValueError, RecursionError) as whole:  # JSONL
        for n, line in enumerate(text.split('\n'), 1):  # splitlines() would also cut at U+2028, which JSON allows inside a text
            try:
                if line.strip():
                    yield f'{path}, line {n}', json.loads(line)
            except (ValueError, RecursionError) as error:
                if n == 1 and suffix == '.json':  # one text over many lines
                    n, error = getattr(whole, 'lineno', 1), whole
                raise ValueError(f'{path}, line {n}: not JSON: {getattr(error, "msg", error)}') from None
        return
    if isinstance(found, dict) and isinstance(found.get('data'), list):
        found = found['data']
    elif isinstance(found, dict) and found and all(isinstance(value, dict) for value in found.values()):
        for key, value in found.items():
            yield f'{path}, {key}', value
        return
    for n, record in enumerate(found if isinstance(found, list) else [found], 1):
        yield f'{path}, record {n}', record


def conversations(record):
    """The conversations in one record; an answer that is not there is an empty text. ValueError for a layout that is none of the above."""
    fields = set(record) if isinstance(record, dict) else {f'a {type(record).__name__}'}
    for needed, read in LAYOUTS:
        if needed <= fields:
            return read(record)
    known = '; '.join(', '.join(sorted(needed)) for needed, _ in LAYOUTS)
    raise ValueError(f'its fields are {", ".join(sorted(fields)) or "none"}; known are records with {known}')


def exchange(question, answers, context=None):
    """The conversation of one question and its answer, of several answers the first that says something."""
    answers = answers['text'] if isinstance(answers, dict) and 'text' in answers else answers
    answers = answers if isinstance(answers, list) else [answers]
    said = [text for text in (plain(answer, 'answer') for answer in answers) if text not in ('', 'no_answer')]
    turns = [('user', plain(question, 'question')), ('context', plain(context, 'context')), ('assistant', said[0] if said else '')]
    return [turn for turn in turns if turn[1] or turn[0] != 'context']


def plain(value, name):
    """A text with line feeds, as a chat has them, and without the blanks around it, which would be learned as part of an answer."""
    if not isinstance(value, str | None):
        raise ValueError(f'its {name} is a {type(value).__name__}, where a text is needed')
    return (value or '').replace('\r\n', '\n').strip()


def of_messages(record):
    turns = []
    for message in record['messages'] if isinstance(record['messages'], list) else [None]:
        if not isinstance(message, dict) or not {'role', 'content'} <= set(message):
            raise ValueError('its messages are no list of {"role": ..., "content": ...}')
        if message['role'] not in ('system', 'user', 'assistant'):
            raise ValueError(f'the role {message["role"]!r} is none of system, user, assistant')
        turns.append((message['role'], plain(message['content'], 'content')))
    return [turns]


def of_dureader(record):
    """Context is the paragraph that a person marked as the one with the answer, where one is marked."""
    marked = [document for document in record['documents'] if document.get('is_selected') and document.get('paragraphs')]
    context = marked[0]['paragraphs'][min(marked[0].get('most_related_para', 0), len(marked[0]['paragraphs']) - 1)] if marked else None
    return [exchange(record['question'], record['answers'], context)]


LAYOUTS = [
    ({'messages'}, of_messages),
    ({'instruction', 'response'}, lambda r: [exchange(r['instruction'], r['response'], r.get('context'))]),
    ({'instruction', 'output'}, lambda r: [exchange(r['instruction'], r['output'], r.get('input'))]),
    ({'question', 'evidences'}, lambda r: [exchange(r['question'], e['answer'], e['evidence']) for e in r['evidences'].values()]),
    ({'question', 'documents', 'answers'}, of_dureader),
    ({'paragraphs'}, lambda r: [exchange(qa['question'], [answer['text'] for answer in qa['answers']], paragraph['context'])
                                for paragraph in r['paragraphs'] for qa in paragraph['qas']]),
    ({'context_text', 'qas'}, lambda r: [exchange(qa['query_text'], qa['answers'], r['context_text']) for qa in r['qas']]),
    ({'question', 'answer'}, lambda r: [exchange(r['question'], r['answer'], r.get('context'))]),
    ({'question', 'answers'}, lambda r: [exchange(r['question'], r['answers'], r.get('context'))]),
    ({'prompt'}, lambda r: [exchange(r['prompt'], r.get('response'))]),
]


def read_conversations(paths):
    """(where, conversation, key) of every conversation in files; key is equal for those that should be in one split together."""
    for path in paths:
        for where, record in records(path):
            try:
                found = conversations(record)
            except (KeyError, TypeError, AttributeError) as error:  # the outer fields fit a layout, the inner ones do not
                raise ValueError(f'{where}: {type(error).__name__} {error} in its fields {", ".join(sorted(record))}, '
                                 'which python -m corpus.conversations --help explains') from None
            except ValueError as error:
                raise ValueError(f'{where}: {error}') from None
            first = {role: text for role, text in reversed(found[0])} if found else {}
            key = first.get('context', first.get('user', ''))
            for turns in found or [[]]:
                yield where, turns, key


def answered(turns):
    """The conversation up to its last answer, or to the last one before an empty answer; [] if there is none."""
    n_turns = next((i for i, turn in enumerate(turns) if turn == ('assistant', '')), len(turns))
    while n_turns and turns[n_turns - 1][0] != 'assistant':
        n_turns -= 1
    return turns[:n_turns]

# -----------------------------------------------------------------------------
# the template

STYLES = {
    'chat': {'system': '### System:\n', 'user': '### User:\n', 'context': '', 'assistant': '### Assistant:\n'},
    'alpaca': {'system': '', 'user': '### Instruction:\n', 'context': '### Context:\n', 'assistant': '### Response:\n'},
}
ROLE_TOKENS = {role: f'<|{role}|>' for role in ('system', 'user', 'assistant')}


def marks(tokenizer, style):
    """The ids that open a turn, by role, and those between a turn and the next where the first is no answer."""
    if style == 'chat' and set(ROLE_TOKENS.values()) <= set(tokenizer.special):
        opening = {role: [tokenizer.special[name]] for role, name in ROLE_TOKENS.items()}
        return {**opening, 'context': tokenizer.encode('\n\n')}, []
    return {role: tokenizer.encode(mark) for role, mark in STYLES[style].items()}, tokenizer.encode('\n\n')


def encode(turns, tokenizer, style, size):
    """A conversation that ends with an answer as ids and mask; or one that ends otherwise as the prompt for its answer.

    turns      list of (role, text)
    size       most tokens. What is longer loses, until it fits: the left of its context, its oldest exchanges but not what the
               system says, the left of its last question
    returns    (ids (n,) int64, mask (n,) uint8, number of turns left out, number of tokens cut off the turns that stayed), or
               None where the last answer alone is too long
    """
    opening, between = marks(tokenizer, style)
    if turns[-1][0] != 'assistant':
        turns = [*turns, ('assistant', None)]  # opened, and neither told nor ended
    parts = []  # [role, mark, text, end], the last three lists of ids
    for role, text in turns:
        end = [] if text is None else [tokenizer.eot] if role == 'assistant' else between
        parts.append([role, opening[role], tokenizer.encode(text or ''), end])
    n_turns, n_cut = len(parts), 0

    def excess():
        return max(0, sum(len(ids) for part in parts for ids in part[1:]) - size)

    def cut(role):
        nonlocal n_cut
        for part in [part for part in parts if part[0] == role][-1:]:
            n = min(excess(), len(part[2]))
            part[2], n_cut = part[2][n:], n_cut + n
    cut('context')
    first = next(i for i, part in enumerate(parts) if part[0] != 'system')
    while excess():
        ends = [i for i, part in enumerate(parts) if part[0] == 'assistant']
        if len(ends) == 1:
            break
        del parts[first:ends[0] + 1]
    cut('user')
    if excess():
        return None
    ids, mask = [], []
    for role, mark, text, end in parts:
        ids += [*mark, *text, *end]
        mask += [0] * len(mark) + [int(role == 'assistant')] * (len(text) + len(end))
    return np.array(ids, dtype=np.int64), np.array(mask, dtype=np.uint8), n_turns - len(parts), n_cut


def check_tokenizer(tokenizer):
    if tokenizer.eot is None:
        raise ValueError(f'a {tokenizer.kind} tokenizer has no end-of-text token, so that no answer could end: '
                         'conversations need gpt2, byte, or one that was trained')

# -----------------------------------------------------------------------------
# packing

def best_fit(lengths, size):
    """Rows of at most size tokens: a list of lists of numbers, such as [[0, 2], [1]].

    Longest first, each into the row where it leaves least room: best-fit decreasing, as for documents in arXiv:2404.10830.
    """
    rows, rooms = [], []  # rooms: (tokens free, row), sorted
    for i in sorted(range(len(lengths)), key=lambda i: -lengths[i]):
        at = bisect_left(rooms, (lengths[i],))
        room, row = rooms.pop(at) if at < len(rooms) else (size, len(rows))
        if row == len(rows):
            rows.append([])
        rows[row].append(i)
        if room > lengths[i]:
            insort(rooms, (room - lengths[i], row))
    return sorted(sorted(row) for row in rows)


def encode_all(found, tokenizer, style, size, verbose):
    """{key: list of (ids, mask)} of conversations, and how many were left out or cut, by the reason."""
    from tqdm import tqdm
    encoded, counts = {}, Counter()

    def tell(where, what):
        counts[what] += 1
        if verbose:
            tqdm.write(f'{where}: {what}')
    for where, turns, key in tqdm(found, desc='tokenizing', unit=' conversations', disable=None):
        kept = answered(turns)
        if not kept:
            tell(where, 'left out, having no answer')
            continue
        if ('assistant', '') in turns:
            tell(where, 'ended before an empty answer')
        fitted = encode(kept, tokenizer, style, size)
        if fitted is None:
            tell(where, 'left out, the answer alone being longer than a row')
            continue
        ids, mask, n_left_out, n_cut = fitted
        if n_left_out or n_cut:
            tell(where, 'cut on the left to fit a row')
        encoded.setdefault(key, []).append((ids, mask))
    return encoded, counts


def build(folder, tokenizer, paths, block_size, style='chat', val_fraction=0.05, val_paths=(), verbose=False):
    """Pack conversations into a dataset folder, replacing the dataset that was there.

    paths         files of the layouts above
    block_size    a row is one token longer; training takes the same block_size
    val_fraction  share of the questions (or of the contexts, where questions have them) for validation, chosen by hash: conversations
                  about the same one are in the same split
    val_paths     files for validation instead; what paths have about the same questions or contexts is left out
    verbose       whether to name each conversation that was left out or cut
    returns       the dict in meta.json
    raises        ValueError, FileNotFoundError; the old dataset then stays
    """
    check_tokenizer(tokenizer)
    if not val_paths and not 0 < val_fraction < 1:
        raise ValueError(f'--val_fraction={val_fraction} must lie between 0 and 1')
    splits, size, held_out = {'train': [], 'val': []}, block_size + 1, set()
    for name, files in (('val', val_paths), ('train', paths)):
        encoded, counts = encode_all(read_conversations(files), tokenizer, style, size, verbose)
        for what, n in counts.items():
            print(f'{what}: {n:,}' + ('' if verbose else ' (-v names them)'))
        if n := sum(len(encoded[key]) for key in held_out & set(encoded)):
            print(f'{n:,} about what the validation files ask, left out of training')
        for key in encoded:
            if key not in held_out:
                splits[name if val_paths else split_by_hash(key, val_fraction)] += encoded[key]
        held_out = set(encoded)
    for name, rows in splits.items():
        if not rows:
            remedy = 'give --val FILE, or another --val_fraction' if name == 'val' else 'give more, or a larger --block_size'
            raise ValueError(f'there is no conversation for the {name} split: {remedy}')

    folder = Path(folder)
    with packing_folder(folder) as work:
        try:
            meta = {'format': 1, 'dtype': id_dtype(tokenizer.vocab_size).name, 'vocab_size': tokenizer.vocab_size,
                    'tokenizer': tokenizer.meta(), 'source': ', '.join(Path(path).name for path in paths),
                    'row_tokens': size, 'style': style,
                    'splits': {name: write_rows(work, name, rows, size, tokenizer) for name, rows in splits.items()}}
            publish(work, folder, meta, masked=True)
        finally:
            shutil.rmtree(work, ignore_errors=True)
    for name, split in meta['splits'].items():
        n_targets = sum(int(mask.sum()) for _, mask in splits[name])
        n_used = sum(len(ids) for ids, _ in splits[name])
        print(f'{folder.resolve().name}/{name}: conversations: {split["documents"]:,}, in {split["tokens"] // size:,} rows of {size:,} tokens; '
              f'{n_targets:,} targets ({n_targets / split["tokens"]:.1%}), {1 - n_used / split["tokens"]:.1%} padding')
    return meta


def write_rows(work, name, encoded, size, tokenizer):
    """Write the .bin, .idx and .mask of one split; returns its entry in meta.json. idx tells where each conversation is."""
    pad = tokenizer.special.get('<|pad|>', tokenizer.eot)
    rows, token_bytes = best_fit([len(ids) for ids, _ in encoded], size), tokenizer.token_bytes()
    files = SplitFiles(work, name, id_dtype(tokenizer.vocab_size), masked=True)
    for row in rows:
        ids, mask = (np.concatenate([encoded[i][part] for i in row]) for part in (0, 1))
        lengths, n_pad = np.array([len(encoded[i][0]) for i in row]), size - len(ids)
        files.write(np.pad(ids, (0, n_pad), constant_values=pad).astype(files.dtype), np.array([np.cumsum(lengths) - lengths, lengths]).T,
                    int(token_bytes[ids].sum()), np.pad(mask, (0, n_pad)))
    files.close()
    return files.entry


def open_tokenizer(name):
    """The tokenizer of a checkpoint or an out_dir; or gpt2, byte, or one from a folder in transformers' format."""
    path = Path(name) / 'ckpt.pt' if (Path(name) / 'ckpt.pt').exists() else Path(name)
    if path.suffix != '.pt':
        return load_tokenizer(tokenizer_meta(name))
    import checkpoint
    meta = checkpoint.read(path, mmap=True).get('tokenizer')
    if meta is None:
        raise ValueError(f'{path} does not say its tokenizer: name it, --tokenizer gpt2 if its model is GPT-2')
    return load_tokenizer(meta)

# -----------------------------------------------------------------------------
# rows for people

def as_text(ids, mask, tokenizer, colour):
    """A row as text with what is trained on in green, or between ⟦ and ⟧, and special tokens by name."""
    names, text = {i: name for name, i in tokenizer.special.items()}, []
    begin, end = ('\x1b[32m', '\x1b[0m') if colour else ('⟦', '⟧')
    borders = np.flatnonzero(np.diff(mask, prepend=mask[0])).tolist()
    for start, stop in zip([0, *borders], [*borders, len(ids)]):
        pieces, plain_ids = [], []
        for i in [*ids[start:stop].tolist(), None]:
            if i is None or i in names:
                pieces += [tokenizer.decode(plain_ids), names.get(i, '')]  # a character may be several tokens
                plain_ids = []
            else:
                plain_ids.append(i)
        piece = ''.join(pieces)
        text.append(f'{begin}{piece}{end}' if mask[start] else piece)
    return ''.join(text)


def show(folder, split, n_rows):
    folder = Path(folder)
    meta = read_meta(folder)
    if not meta.get('row_tokens') or split not in meta['splits'] or not (folder / f'{split}.mask').exists():
        raise ValueError(f'{folder} has no rows of conversations in a {split} split: python -m corpus.conversations build makes them')
    tokenizer, size = load_tokenizer(meta['tokenizer']), meta['row_tokens']
    ids = np.memmap(folder / f'{split}.bin', np.dtype(meta['dtype']).newbyteorder('<'), 'r').reshape(-1, size)
    mask = np.memmap(folder / f'{split}.mask', np.uint8, 'r').reshape(-1, size)
    table = np.fromfile(folder / f'{split}.idx', '<i8').reshape(-1, 2)
    for row in range(min(n_rows, len(ids))):
        here = table[table[:, 0] // size == row]
        used = int(here.sum(axis=1).max()) - row * size
        print(f'--- row {row} of {len(ids):,}: conversations: {len(here)}, targets: {int(mask[row].sum())}, padding: {size - used}')
        print(as_text(ids[row, :used], mask[row, :used], tokenizer, sys.stdout.isatty()))

# -----------------------------------------------------------------------------
# command line

def add_arguments(parser, folder=None, style='chat'):
    """The flags of build, for the prepare scripts, too: these have a folder, where the dataset goes by default."""
    parser.add_argument('--val', nargs='+', default=[], metavar='FILE', help='for validation, instead of a share of the input')
    parser.add_argument('--val_fraction', type=float, default=0.05, help='share for validation (default: %(default)s)')
    parser.add_argument('--tokenizer', default='gpt2', help='gpt2, byte, a checkpoint, or a folder with tokenizer.json (default: %(default)s)')
    parser.add_argument('--block_size', type=int, default=1024, help='as in training; a row holds one token more (default: %(default)s)')
    parser.add_argument('--style', choices=list(STYLES), default=style, help='prompt template (default: %(default)s)')
    parser.add_argument('--out', type=Path, default=folder, required=folder is None,
                        help='dataset folder' + (' (default: the folder of this script)' if folder else ''))
    parser.add_argument('-v', '--verbose', action='store_true', help='name each conversation that is left out or cut')


def prepare(folder, doc, download=None, style='chat'):
    """The whole of a prepare script: its command line, and the files packed.

    folder    of the script and, by default, of the dataset
    doc       its docstring, shown by --help
    download  function that returns the path of the file where --input names none; None: --input has to
    style     prompt template by default
    """
    parser = argparse.ArgumentParser(description=doc, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('--input', nargs='+', required=download is None, metavar='FILE', help='files that are here already')
    add_arguments(parser, folder, style)
    args = parser.parse_args()
    build_from(args, args.input or [download()])


def build_from(args, paths):
    if args.block_size < 1:
        raise ValueError(f'--block_size={args.block_size} must be 1 or more')
    build(args.out, open_tokenizer(args.tokenizer), paths, args.block_size, args.style, args.val_fraction, args.val, verbose=args.verbose)
    base = args.tokenizer if args.tokenizer.endswith('.pt') else 'gpt2' if args.tokenizer == 'gpt2' else 'CHECKPOINT'
    dataset, out = dataset_name(args.out), Path(args.out).resolve().name
    print(f'next: python train.py config/finetune_dolly.py --init_from={base}' + ('' if dataset == 'dolly' else f' --dataset={dataset} --out_dir=out-{out}'))


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(dest='command', required=True)
    make = commands.add_parser('build', help='pack conversations', description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    make.add_argument('--input', nargs='+', required=True, metavar='FILE')
    add_arguments(make)
    look = commands.add_parser('show', help='print rows, with what is trained on in green, or between ⟦ and ⟧ where there is no colour')
    look.add_argument('folder', type=Path)
    look.add_argument('--split', choices=['train', 'val'], default='train')
    look.add_argument('--rows', type=int, default=3, help='how many (default: %(default)s)')
    args = parser.parse_args()
    if args.command == 'show':
        return show(args.folder, args.split, args.rows)
    build_from(args, args.input)


if __name__ == '__main__':
    with one_line_errors():
        main()
