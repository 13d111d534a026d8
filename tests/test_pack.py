"""corpus/pack.py as a command: build, mix and inspect."""
import json
import os
import random
import shlex
import shutil
import signal
import subprocess
import sys
import unicodedata

import numpy as np
import pytest
from conftest import ROOT, survives
from test_corpora import MERGES, TEXTS, contents, files_of, needs_gpt2, pack_texts, small_batches  # noqa: F401 (a fixture)
from test_prepare import Numbers
from test_readers import PAGES, ROWS, SHARED, WRITERS, write_block, write_jsonl, write_wiki

from corpus import encode, pack, writer
from corpus.encode import cleaned, split_by_hash
from corpus.mix import mixed_documents
from corpus.pack import write_dataset
from files import one_line_errors
from tokens.dataset import Split, read_meta
from tokens.loader import Loader
from tokens.tokenizer import CharTokenizer, load_tokenizer
from tokens.windows import count_of_each

CHINESE = [SHARED / name for name in ('cmrc2018_dev_1500.jsonl', 'song_ci_simplified.txt')]


def run(monkeypatch, capsys, *args):
    """python -m corpus.pack in this process: (exit code, stdout, stderr)."""
    monkeypatch.setenv('FLATGPT_CACHE', str(MERGES.parent))
    monkeypatch.setattr(sys, 'argv', ['pack.py', *map(str, args)])
    code = 0
    try:
        with one_line_errors():
            pack.main()
    except SystemExit as stop:
        code = stop.code
    return code, *capsys.readouterr()


def texts_in(folder, split):
    """The documents of a dataset, decoded."""
    meta = read_meta(folder)
    tokenizer = load_tokenizer(meta['tokenizer'])
    ids = np.frombuffer(contents(folder)[1][split], dtype=meta['dtype'])
    index = np.fromfile(folder / f'{split}.idx', dtype='<i8').reshape(-1, 2)
    return [tokenizer.decode(ids[offset:offset + length]) for offset, length in index]

# -----------------------------------------------------------------------------
# build

@pytest.mark.parametrize('name', [*WRITERS, 'a.xml'])
def test_every_format_becomes_a_dataset(tmp_path, monkeypatch, capsys, name):
    monkeypatch.setenv('HF_HUB_OFFLINE', '1')
    if name == 'a.xml':
        pytest.importorskip('mwparserfromhell')
        write_wiki(tmp_path / name, [(row['title'], 0, None, row['text']) for row in ROWS] + PAGES[1:4])
    else:
        WRITERS[name](tmp_path / name)
    code, stdout, stderr = run(monkeypatch, capsys, 'build', '--input', tmp_path / name, '--tokenizer=char', '--val_fraction=0.6',
                               '--field=title,text', '--out', tmp_path / 'out')
    assert code == 0, stderr
    texts = [f'{row["title"]}\n{row["text"]}' for row in ROWS]
    for split in ('train', 'val'):
        assert texts_in(tmp_path / 'out', split) == [text for text in texts if split_by_hash(text, 0.6) == split]
    meta = read_meta(tmp_path / 'out')
    assert meta['tokenizer']['chars'] == ''.join(sorted(set(''.join(texts)))) and meta['source'] == name
    assert stdout.splitlines()[-1].startswith('next: python train.py config/quickstart.py --dataset=')


@needs_gpt2
def test_blocks_train_with_the_rows_and_the_mask_they_had(tmp_path, monkeypatch, capsys):
    draw = np.random.default_rng(0)
    ids, mask = draw.integers(0, 50257, (60, 17)), draw.integers(0, 2, (60, 16))
    mask[:, -1] = 1
    for n in range(3):
        part = slice(20 * n, 20 * n + 20)
        write_block(tmp_path / 'main' / f'block_{n}', ids[part, :-1], ids[part, 1:], mask[part])
    code, _, stderr = run(monkeypatch, capsys, 'build', '--input', tmp_path / 'main', '--tokenizer=gpt2', '--val_fraction=0.2', '--out', tmp_path / 'out')
    assert code == 0, stderr
    loader = Loader(tmp_path / 'out', 'train', block_size=16, batch_size=1, order='documents')
    known = {tuple(row[:-1]): np.where(m, row[1:], -100).tolist() for row, m in zip(ids.tolist(), mask)}
    seen = set()
    for step in range(loader.n_windows):
        x, y, _ = loader.batch(step)
        assert known[tuple(x[0].tolist())] == y[0].tolist()
        seen.add(tuple(x[0].tolist()))
    assert len(seen) == loader.n_windows == read_meta(tmp_path / 'out')['splits']['train']['documents'] > 30


def test_chinese_corpora_of_two_formats(tmp_path, monkeypatch, capsys):
    """A folder per class, as THUCNews, and questions with their passages."""
    if not CHINESE[0].exists():
        pytest.skip(f'{CHINESE[0]} is absent')
    passages = list(dict.fromkeys(json.loads(line)['context'] for line in CHINESE[0].read_text(encoding='utf-8').splitlines()))[:60]
    for n, text in enumerate(passages[:30]):
        (tmp_path / 'THUCNews' / ('体育', '财经')[n % 2]).mkdir(parents=True, exist_ok=True)
        (tmp_path / 'THUCNews' / ('体育', '财经')[n % 2] / f'{n}.txt').write_text(text, encoding='utf-8')
    shutil.copy(CHINESE[0], tmp_path / 'cmrc.jsonl')
    code, stdout, stderr = run(monkeypatch, capsys, 'build', '--input', tmp_path / 'THUCNews', tmp_path / 'cmrc.jsonl', '--field=context', '--tokenizer=char',
                               '--clean', '--val_fraction=0.1', '--out', tmp_path / 'out')
    assert code == 0, stderr
    found = texts_in(tmp_path / 'out', 'train') + texts_in(tmp_path / 'out', 'val')
    assert len(set(found)) == len(found) and {cleaned(text) for text in passages} <= set(found)
    assert stdout.startswith('out: 1,103 left out: ')


def test_what_is_cleaned():
    text = '\ufeffe\u0301\r\nb\x00c\x1b\u0085\td\r \n'
    assert cleaned(text) == 'é\nbc\td'
    assert cleaned(cleaned(text)) == cleaned(text) and unicodedata.is_normalized('NFC', cleaned(text))


def test_options_leave_out_what_they_say(tmp_path, monkeypatch, capsys):
    texts = [f'text {n % 300} ' + 'x' * (n % 300 // 100) for n in range(400)]
    (tmp_path / 'a.jsonl').write_text('\n'.join(map(json.dumps, texts)), encoding='utf-8')

    def build(out, *options):
        code, _, stderr = run(monkeypatch, capsys, 'build', '--input', tmp_path / 'a.jsonl', '--tokenizer=char', '--val_fraction=0.1', '--out', out, *options)
        assert code == 0, stderr
        return texts_in(out, 'train') + texts_in(out, 'val')
    unique = [text.strip() for text in texts[:300]]
    assert sorted(build(tmp_path / 'a')) == sorted(texts)
    assert sorted(build(tmp_path / 'b', '--clean')) == sorted(unique)
    assert sorted(build(tmp_path / 'c', '--clean', '--min_chars=9')) == sorted(text for text in unique if len(text) > 8)
    sampled = build(tmp_path / 'd', '--clean', '--sample=0.3')
    assert 60 < len(sampled) < 120 and set(sampled) < set(build(tmp_path / 'e', '--clean', '--sample=0.5'))
    assert sorted(build(tmp_path / 'f', '--clean', '--max_docs=250')) == sorted(unique[:250])
    assert 2 < sum(split_by_hash(text, 0.1) == 'val' for text in sampled) < 30  # the sample does not decide the split


def test_a_closed_stderr_needs_no_progress(tmp_path):
    (tmp_path / 'a.txt').write_text('a line\n' * 100, encoding='utf-8')
    command = sys.executable, '-m', 'corpus.pack', 'build', '--input', str(tmp_path / 'a.txt'), '--tokenizer=char', '--out', str(tmp_path / 'out')
    assert subprocess.run(['sh', '-c', 'exec "$@" 2>&-', '-', *command], cwd=ROOT, capture_output=True).returncode == 0
    assert read_meta(tmp_path / 'out')['splits']['train']['tokens'] > 600


def test_workers_leave_no_trace(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(encode, 'BATCH_DOCUMENTS', 20)
    texts = [text for text in TEXTS + TEXTS[:100]]
    (tmp_path / 'in').mkdir()
    (tmp_path / 'in' / 'a.jsonl').write_text('\n'.join(json.dumps({'text': text}) for text in texts), encoding='utf-8')
    for n, text in enumerate(texts[:50]):
        (tmp_path / 'in' / f'b{n}.txt').write_text(text, encoding='utf-8')
    for workers in (1, 3):
        code, _, stderr = run(monkeypatch, capsys, 'build', '--input', tmp_path / 'in', '--tokenizer=char', '--clean', '--val_fraction=0.1',
                              '--shard_tokens=1000', f'--workers={workers}', '--out', tmp_path / f'{workers}' / 'out')
        assert code == 0, stderr
    assert files_of(tmp_path / '1') == files_of(tmp_path / '3')


@pytest.mark.skipif(not hasattr(os, 'fork'), reason='kills forked processes')
@pytest.mark.filterwarnings('ignore:This process')  # torch has threads, the child uses none of them
def test_killed_while_it_drops_duplicates_it_continues_to_the_same_bytes(tmp_path, small_batches, monkeypatch):  # noqa: F811
    monkeypatch.setattr(encode, 'BATCH_DOCUMENTS', 40)
    monkeypatch.setattr(writer, 'MERGE_SEEN', 7)
    texts = TEXTS[:150] + TEXTS[100:250] + TEXTS[:50]
    meta = pack_texts(tmp_path / 'whole', texts, clean=True)
    assert sum(split['documents'] for split in meta['splits'].values()) == len({cleaned(text) for text in texts} - {''})
    for n in range(5, 1000, 17):
        folder = tmp_path / str(n)
        survived = survives(n, lambda: pack_texts(folder, texts, clean=True))
        pack_texts(folder, texts, clean=True)
        assert files_of(folder) == files_of(tmp_path / 'whole'), n
        if survived:
            break
    assert n > 50


# corpus/pack.py with small batches and progress saved after each; it stops after a number of documents, so that a kill is never too late
STOPPING = '''
import sys, time
sys.path.insert(0, sys.argv.pop(1))
from corpus import encode, pack
encode.BATCH_DOCUMENTS, pack.SAVE_EVERY_S, stops_after, write_batch = 50, -1, int(sys.argv.pop(1)), pack.write_batch
def write_and_stop(writer, *rest):
    write_batch(writer, *rest)
    if writer.progress.n_read >= stops_after:
        print('stopped', flush=True)
        time.sleep(600)
pack.write_batch = write_and_stop
pack.main()
'''


@pytest.mark.skipif(os.name != 'posix', reason='needs kill -9')
def test_killed_as_a_command_and_continued_with_other_workers(tmp_path):
    rng = random.Random(0)
    with open(tmp_path / 'a.jsonl', 'w', encoding='utf-8') as file:
        for n in range(2_000):
            file.write(json.dumps({'text': f'{n} ' + rng.choice('abcdefgh') * rng.randrange(200)}) + '\n')

    def start(out, workers, stops_after=10_000):
        return subprocess.Popen([sys.executable, '-c', STOPPING, str(ROOT), str(stops_after), 'build', '--input', str(tmp_path / 'a.jsonl'), '--tokenizer=char', '--clean',
                                 '--out', str(out), f'--workers={workers}', '--shard_tokens=10000'], stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    whole = start(tmp_path / 'whole' / 'out', 1)
    printed, _ = whole.communicate()
    assert whole.returncode == 0, printed
    killed = start(tmp_path / 'killed' / 'out', 2, stops_after=1_230)
    assert 'stopped\n' in iter(killed.stdout.readline, '')
    killed.send_signal(signal.SIGKILL)
    killed.communicate()
    assert (tmp_path / 'killed' / 'out' / '.packing' / 'progress').exists() and not (tmp_path / 'killed' / 'out' / 'meta.json').exists()
    again = start(tmp_path / 'killed' / 'out', 1)
    printed, _ = again.communicate()
    assert again.returncode == 0 and 'out: continuing after ' in printed
    assert files_of(tmp_path / 'killed') == files_of(tmp_path / 'whole')


def broken(path):
    path.write_bytes(b'{"text": "fine"}\n{"text": "\xff"}\n')


@pytest.mark.parametrize('write, args, error', [
    (broken, [], 'a.jsonl, line 2: not UTF-8 (invalid start byte): convert it to UTF-8, name its encoding with --encoding, or use corpus.pack --errors=replace'),
    (write_jsonl, ['--field=body'], "a.jsonl, line 1: no field 'body' with text, only id, title, text: name the field to take with --field"),
    (lambda path: path.write_text(''), [], 'there is no text in the corpus'),
    (lambda path: path.write_text('{"text": ""}\n'), ['--tokenizer=gpt2'], 'there is no text for the train split: give more text, or another --val_fraction'),
    (lambda path: None, [], 'a.jsonl: no such file or folder'),
    (write_jsonl, ['--tokenizer=gpt3'], 'tokenizer gpt3: accepted are char, gpt2, byte, and a folder with tokenizer.json: python -m corpus.train_tokenizer train --input TEXT --out FOLDER makes one'),
    (write_jsonl, ['--sample=0'], '--sample: 0 must lie between 0 and 1'),
    (write_jsonl, ['--min_chars=0'], '--min_chars: 0 must be 1 or more'),
])
@needs_gpt2
def test_bad_input_is_one_line_and_exit_2(tmp_path, monkeypatch, capsys, write, args, error):
    monkeypatch.chdir(tmp_path)
    write(tmp_path / 'a.jsonl')
    code, _, stderr = run(monkeypatch, capsys, 'build', '--input', 'a.jsonl', '--tokenizer=char', '--out', 'out', '--val_fraction=0.3', *args)
    assert (code, stderr) == (2, error + '\n')
    assert not (tmp_path / 'out' / 'meta.json').exists()


@needs_gpt2
def test_what_errors_replace_offers_continues_the_run_that_offered_it(tmp_path, monkeypatch, capsys):
    broken(tmp_path / 'a.jsonl')
    (tmp_path / 'b.jsonl').write_text('\n'.join(json.dumps(f'text {n}') for n in range(20)), encoding='utf-8')
    build = ['build', '--input', tmp_path, '--tokenizer=gpt2', '--out', tmp_path / 'out', '--val_fraction=0.5']
    assert run(monkeypatch, capsys, *build)[0] == 2
    code, _, stderr = run(monkeypatch, capsys, *build, '--errors=replace_all')
    assert code == 0, stderr
    assert '\ufffd' in texts_in(tmp_path / 'out', 'train') + texts_in(tmp_path / 'out', 'val')


@needs_gpt2
def test_ids_beyond_the_vocabulary_are_one_line(tmp_path, monkeypatch, capsys):
    write_block(tmp_path / 'main' / 'b0', [[1, 2], [3, 50257]], [[2, 3], [50257, 4]])
    code, _, stderr = run(monkeypatch, capsys, 'build', '--input', tmp_path / 'main', '--tokenizer=gpt2', '--out', tmp_path / 'out')
    assert (code, stderr) == (2, f'{tmp_path}/main/b0/token_float32.npy, row 1 holds token id 50257 at position 1, outside the vocabulary of 50257 tokens\n')


@pytest.mark.skipif(sys.platform != 'linux', reason='needs a limit on the size of files')
def test_a_full_disk_is_one_line_and_leaves_no_dataset(tmp_path):
    (tmp_path / 'a.txt').write_text(''.join(f'{n}' + 'abc' * 100 + '\n' for n in range(1000)), encoding='utf-8')
    code = ('import resource, runpy, sys; resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, 100_000)); sys.argv = sys.argv[1:]; '
            'runpy.run_path(sys.argv[0], run_name="__main__")')
    done = subprocess.run([sys.executable, '-c', code, str(ROOT / 'corpus' / 'pack.py'), 'build', '--input', str(tmp_path / 'a.txt'), '--format=lines',
                           '--tokenizer=char', '--out', str(tmp_path / 'out')], capture_output=True, text=True, encoding='utf-8')
    assert done.returncode == 2 and done.stderr.count('\n') == 1, done.stderr
    assert done.stderr == f'{tmp_path}/out cannot be written (File too large): make room and run this again\n'
    assert not (tmp_path / 'out' / 'meta.json').exists()

# -----------------------------------------------------------------------------
# mix

T = 8
WEIGHTS = [[0.6, 0.4], [0.6, 0.3, 0.1], [0.98, 0.02], [0.25] * 4]


def shares(sources, k, window):
    """The share of source k in every run of so many."""
    count = np.concatenate(([0], np.cumsum(sources == k)))
    return (count[window:] - count[:-window]) / window


@pytest.mark.parametrize('weights', WEIGHTS)
def test_the_loader_keeps_shares_over_any_1000_windows(weights):
    pattern = np.diff(count_of_each(weights, np.arange(3001)), axis=1).argmax(axis=0)
    for k, weight in enumerate(weights):
        assert abs(shares(pattern, k, 1000) - weight).max() < 0.01


@pytest.mark.parametrize('weights', WEIGHTS)
def test_a_mix_keeps_shares_over_any_1000_windows_of_the_file(tmp_path, monkeypatch, weights):
    """Documents of 1 to 5000 tokens; every token of source k is k."""
    monkeypatch.setattr('corpus.mix.load_tokenizer', lambda meta: Numbers(10))
    monkeypatch.setattr('tokens.dataset.vocab_size_of', lambda meta: 10)
    draw = random.Random(0)
    for k in range(len(weights)):
        rows = [[k] * draw.choice([1, 3, 15, 200, 5000][:3 + k]) for _ in range(3000)]
        write_dataset(tmp_path / str(k), Numbers(10), {'train': rows}, 'test', eot_in_rows=True)
    splits = [Split(tmp_path / str(k), 'train') for k in range(len(weights))]
    pieces = list(mixed_documents(splits, weights, 2 * T))
    sources = np.concatenate([np.full(len(ids) + 1, ids[0]) for ids, _ in pieces])  # the eot before each counts, too
    assert len(sources) > 20_000 and max(len(ids) for ids, _ in pieces) <= 2 * T
    for k, weight in enumerate(weights):
        assert abs(shares(sources, k, 1000 * T) - weight).max() < 0.01


def pack_text(folder, text, masked=False):
    """Documents of one character each time, in training and validation alike."""
    tokenizer = CharTokenizer('abcd')
    documents = [(tokenizer.encode_array(text), np.arange(len(text)) % 2)] * 50 if masked else [text] * 50
    write_dataset(folder, tokenizer, {'train': documents, 'val': documents[:5]}, 'test', masked=masked)


def test_mixed_until_the_first_ends(tmp_path, monkeypatch, capsys):
    pack_text(tmp_path / 'a', 'ab' * 10)
    pack_text(tmp_path / 'b', 'cd' * 10, masked=True)
    datasets = f'{tmp_path}/a:0.75,{tmp_path}/b:0.25'
    code, _, stderr = run(monkeypatch, capsys, 'mix', datasets, '--out', tmp_path / 'mixed')
    assert code == 0, stderr
    meta = read_meta(tmp_path / 'mixed')
    ids = np.frombuffer(contents(tmp_path / 'mixed')[1]['train'], dtype='<u2')
    mask = np.fromfile(tmp_path / 'mixed' / 'train.mask', dtype=np.uint8)
    assert (ids < 2).sum() == 1000 and 310 < (ids > 1).sum() <= 340 and meta['splits']['train']['bytes'] == len(ids) == len(mask)
    assert mask[ids < 2].all() and (mask == (ids != 2))[ids > 1].all()
    Loader(tmp_path / 'mixed', 'train', block_size=8, batch_size=4).batch(0)


def test_a_mix_without_masks_has_none_and_one_of_rows_is_refused(tmp_path, monkeypatch, capsys):
    for name, text in (('a', 'ab'), ('b', 'cd')):
        pack_text(tmp_path / name, text * 10)
    mix = ['mix', f'{tmp_path}/a:0.75,{tmp_path}/b:0.25', '--out', tmp_path / 'mixed']
    code, _, stderr = run(monkeypatch, capsys, *mix)
    assert code == 0, stderr
    assert sorted(files_of(tmp_path / 'mixed')) == ['meta.json', 'train.bin', 'train.idx', 'val.bin', 'val.idx']
    meta = json.loads((tmp_path / 'b' / 'meta.json').read_text(encoding='utf-8'))
    (tmp_path / 'b' / 'meta.json').write_text(json.dumps({**meta, 'row_tokens': 2}), encoding='utf-8')
    for name, split in meta['splits'].items():
        (tmp_path / 'b' / f'{name}.mask').write_bytes(bytes(split['tokens']))
    code, _, stderr = run(monkeypatch, capsys, *mix)
    assert code == 2 and 'was packed in rows, which a mixed file would cut' in stderr


def test_a_run_on_a_mixture_resumes_at_the_same_windows(tmp_path):
    pack_text(tmp_path / 'a', 'ab' * 10)
    pack_text(tmp_path / 'b', 'cd' * 10)

    def batches(first, ranks):
        loaders = [Loader([tmp_path / 'a', tmp_path / 'b'], 'train', block_size=8, batch_size=8 // ranks, rank=rank, world_size=ranks, weights=[0.7, 0.3])
                   for rank in range(ranks)]
        return [[row for loader in loaders for row in loader.batch(step)[0].tolist()] for step in range(first, 400)]
    unbroken = batches(0, 1)
    assert batches(250, 1) == unbroken[250:] and batches(250, 2) == unbroken[250:]
    from_a = np.array([max(row) < 2 for batch in unbroken for row in batch])
    assert abs(shares(from_a, True, 1000) - 0.7).max() < 0.01


@pytest.mark.parametrize('args, error', [
    (['a,other'], 'other and a were packed with different tokenizers: pack them with one'),
    (['a', '--out=a'], '--out=a is one of the datasets to mix: name another folder'),
    (['a,b', '--shard_tokens=0'], '--shard_tokens: 0 must be 1 or more'),
    (['a:x'], "dataset=a:x: 'a:x' is no NAME or NAME:WEIGHT with a weight above 0, such as zhwiki:0.7")])
def test_mixtures_that_cannot_be(tmp_path, monkeypatch, capsys, args, error):
    monkeypatch.chdir(tmp_path)
    pack_text(tmp_path / 'a', 'ab')
    write_dataset(tmp_path / 'other', CharTokenizer('xyz'), {'train': ['xyz'], 'val': ['x']}, 'test')
    code, _, stderr = run(monkeypatch, capsys, 'mix', '--out=out', *args)
    assert (code, stderr) == (2, error + '\n') and not (tmp_path / 'out').exists()

# -----------------------------------------------------------------------------
# inspect

def test_inspect_shows_counts_and_text_and_verifies(tmp_path, monkeypatch, capsys):
    write_dataset(tmp_path, CharTokenizer('北京\n'), {'train': ['北京' * 100, '京\n'], 'val': ['北']}, 'two texts')
    capsys.readouterr()
    code, stdout, stderr = run(monkeypatch, capsys, 'inspect', tmp_path)
    assert code == 0, stderr
    assert stdout.splitlines() == [
        f'{tmp_path}: uint16, char tokenizer of 3 tokens; source: two texts', '',
        'train: 202 tokens, shards: 1', '2 documents, 604 bytes, 2.990 bytes per token',
        f'train.bin, tokens 0 on: {"北京" * 32!r}', f'train.bin, tokens 101 on: {"京北" * 32!r}', 'checksums verified: 1 of 1 shards', '',
        'val: 1 tokens, shards: 1', '1 documents, 3 bytes, 3.000 bytes per token',
        "val.bin, tokens 0 on: '北'", "val.bin, tokens 0 on: '北'", 'checksums verified: 1 of 1 shards']
    data = bytearray((tmp_path / 'train.bin').read_bytes())
    data[100] ^= 1
    (tmp_path / 'train.bin').write_bytes(data)
    code, _, stderr = run(monkeypatch, capsys, 'inspect', tmp_path)
    assert code == 2 and stderr.startswith(f'{tmp_path}/train.bin') and stderr.count('\n') == 1


@needs_gpt2
def test_inspect_reads_a_folder_of_nanogpt(tmp_path, monkeypatch, capsys):
    np.array([15496, 995, 50256, 15496, 995] * 20, dtype='<u2').tofile(tmp_path / 'train.bin')
    np.array([15496, 995], dtype='<u2').tofile(tmp_path / 'val.bin')
    code, stdout, stderr = run(monkeypatch, capsys, 'inspect', tmp_path)
    assert code == 0, stderr
    assert 'train: 100 tokens' in stdout
    assert "tokens 0 on: 'Hello world<|endoftext|>Hello" in stdout and 'checksums verified: 0 of 1 shards' in stdout
    np.array([50257], dtype='<u2').tofile(tmp_path / 'val.bin')
    code, _, stderr = run(monkeypatch, capsys, 'inspect', tmp_path)
    assert (code, stderr) == (2, 'token id 50257 is outside the vocabulary of 50257 tokens\n')

# -----------------------------------------------------------------------------
# command lines

def test_one_document_is_cut_at_a_line_end(tmp_path, monkeypatch, capsys):
    lines = [f'line {n} of the only text' for n in range(1000)]
    (tmp_path / 'a.txt').write_text('\n'.join(lines), encoding='utf-8')
    code, stdout, stderr = run(monkeypatch, capsys, 'build', '--input', tmp_path / 'a.txt', '--tokenizer=char', '--out', tmp_path / 'out')
    assert code == 0, stderr
    [train], [val] = texts_in(tmp_path / 'out', 'train'), texts_in(tmp_path / 'out', 'val')
    assert train.endswith('\n') and train + val == '\n'.join(lines) and 5 <= len(val.splitlines()) <= 15
    assert 'out: all documents fell to one split: the last one is cut, its end is for validation\n' in stdout


@pytest.mark.parametrize('options', [[], ['--clean'], ['--max_docs=3'], ['--clean', '--max_docs=3']])
def test_of_few_documents_the_last_one_is_cut(tmp_path, monkeypatch, capsys, options):
    texts = ['one', 'two', 'th\nree', *(['four'] if '--max_docs=3' in options else [])]
    (tmp_path / 'a.jsonl').write_text('\n'.join(map(json.dumps, texts)), encoding='utf-8')
    code, _, stderr = run(monkeypatch, capsys, 'build', '--input', tmp_path / 'a.jsonl', '--tokenizer=char', '--val_fraction=0.001', '--out', tmp_path / 'out',
                          *options)
    assert code == 0, stderr
    first = 'th' if '--clean' in options else 'th\n'
    assert texts_in(tmp_path / 'out', 'train') == ['one', 'two', first] and texts_in(tmp_path / 'out', 'val') == ['ree']


def test_characters_of_documents_beyond_max_docs_are_no_error(tmp_path, monkeypatch, capsys):
    """They lie in the same batch as the last document that is taken."""
    (tmp_path / 'a.jsonl').write_text('\n'.join(json.dumps(text) for text in [*'abcdefgh', *'aaxyz']), encoding='utf-8')
    code, _, stderr = run(monkeypatch, capsys, 'build', '--input', tmp_path / 'a.jsonl', '--tokenizer=char', '--clean', '--max_docs=8',
                          '--val_fraction=0.5', '--out', tmp_path / 'out')
    assert code == 0, stderr
    assert read_meta(tmp_path / 'out')['tokenizer']['chars'] == 'abcdefgh'


def test_the_next_command_can_be_pasted(tmp_path, monkeypatch, capsys):
    (tmp_path / 'a.txt').write_text('abc\n' * 99, encoding='utf-8')
    out = tmp_path / "it's mine; really"
    code, stdout, stderr = run(monkeypatch, capsys, 'build', '--input', tmp_path / 'a.txt', '--tokenizer=char', '--out', out)
    assert code == 0, stderr
    words = shlex.split(stdout.splitlines()[-1])
    assert words[:4] == ['next:', 'python', 'train.py', 'config/quickstart.py']
    assert words[4].endswith("it's mine; really") and words[5] == "--out_dir=out-it's mine; really"


@pytest.mark.skipif(sys.platform != 'linux', reason='other systems refuse such names')
def test_a_file_name_that_is_not_utf8(tmp_path):
    name = os.fsencode(tmp_path) + '/中文.txt'.encode('gb18030')
    with open(name, 'wb') as file:
        file.write('一\n二\n三\n'.encode() * 20)
    done = subprocess.run([sys.executable, '-m', 'corpus.pack', 'build', '--input', name, '--tokenizer=char', '--out', str(tmp_path / 'out')],
                          cwd=ROOT, capture_output=True)
    assert done.returncode == 0, done.stderr.decode()
    assert read_meta(tmp_path / 'out')['source'].endswith('.txt')


@pytest.mark.parametrize('args, error', [
    (['build', '--inptu', 'a'], 'the following arguments are required: --input, --out, --tokenizer'),
    (['build', '--input', 'a', '--tokenizer=char', '--out=b', '--cleen'], '--cleen: unknown argument, did you mean --clean?'),
    (['build', '--input', 'a', '--tokenizer=char', '--out=b', '--clean=maybe'], '--clean: maybe: accepted are True, False'),
    (['build', '--input', 'a', '--tokenizer=char', '--out=b', '--max_docs=x'], "--max_docs: invalid count value: 'x'"),
    (['biuld'], 'biuld: accepted are build, mix, inspect')])
def test_wrong_arguments_are_one_line(monkeypatch, capsys, args, error):
    assert run(monkeypatch, capsys, *args) == (2, '', error + '\n')


def test_a_switch_may_have_a_value(tmp_path, monkeypatch, capsys):
    (tmp_path / 'a.jsonl').write_text('\n'.join(json.dumps(f'text {n % 50}') for n in range(100)), encoding='utf-8')
    for switch, n_documents in ((['--clean'], 50), (['--clean=True'], 50), (['--clean=False'], 100), (['--clean', 'True'], 50)):
        code, _, stderr = run(monkeypatch, capsys, 'build', '--input', tmp_path / 'a.jsonl', '--tokenizer=char', '--val_fraction=0.2',
                              '--out', tmp_path / 'out', *switch)
        assert code == 0, stderr
        assert sum(split['documents'] for split in read_meta(tmp_path / 'out')['splits'].values()) == n_documents


def test_rows_of_a_tokenizer_without_text(tmp_path):
    """launch/gpu_check.py makes its data so."""
    from tokens.tokenizer import IdTokenizer
    meta = write_dataset(tmp_path / 'data', IdTokenizer(50257), {'train': [np.arange(100)], 'val': [np.arange(50, 70)]}, 'ids')
    assert meta['splits']['train']['tokens'] == 100 and meta['dtype'] == 'uint16'
