"""Corpora: corpus/pack.py and the prepare scripts of OpenWebText, FineWeb and Shakespeare, on Parquet files written here."""
import contextlib
import filecmp
import http.server
import json
import os
import random
import signal
import subprocess
import sys
import threading
import urllib.parse
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
from conftest import survives
from test_prepare import SHARED, contents, data, run  # noqa: F401 (data is a fixture)

from corpus import encode, pack, writer
from corpus.encode import Encoder, split_by_hash
from corpus.options import read_files
from corpus.readers import Document, find_files
from tokens.dataset import read_meta
from tokens.loader import Loader
from tokens.tokenizer import CharTokenizer

pa = pytest.importorskip('pyarrow')
pq = pytest.importorskip('pyarrow.parquet')

MERGES = SHARED / 'gpt2_bpe' / 'vocab.bpe'
needs_gpt2 = pytest.mark.skipif(not MERGES.exists(), reason=f'{MERGES} is absent')


class Bytes:
    """A tokenizer with eot, made of nothing: UTF-8 bytes, and 256 to end a text."""
    vocab_size, eot = 257, 256

    def encode_batch(self, texts):
        return [np.frombuffer(text.encode(), dtype=np.uint8).astype(np.int32) for text in texts]

    def token_bytes(self):
        return np.array([1] * 256 + [0])

    def meta(self):
        return {'kind': 'bytes'}


def make_texts(n, seed=0):
    """n texts of 0 to 200 characters, some of them beyond ASCII, some empty."""
    draw = random.Random(seed)
    return [''.join(draw.choice('abcdefgh \u00e9\u4f60\n') for _ in range(draw.choice([0, 3, 40, 200]))) for _ in range(n)]


TEXTS = make_texts(400)
CHARS = CharTokenizer(''.join(sorted(set(''.join(TEXTS)))))
PACK = dict(val_fraction=0.1, clean=False, min_chars=1, n_threads=1)


def pack_texts(folder, texts=TEXTS, tokenizer=None, read=None, shard_tokens=3000, **changed):
    tokenizer, settings = tokenizer or Bytes(), {**PACK, **changed}
    recipe = {'tokenizer': tokenizer.meta(), 'shard_tokens': shard_tokens, **settings, 'n_threads': None}
    return pack.pack(folder, read or (lambda start: records_of(texts, start)), Encoder(tokenizer, **settings), 'a test', shard_tokens=shard_tokens, recipe=recipe)


def records_of(texts, start=0):
    """The texts from the start on, as a script has them that reads no file."""
    return (Document(text, f'document {n}') for n, text in enumerate(texts[start:], start))


def files_of(folder):
    """{name: bytes} of all files below a folder."""
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in sorted(folder.rglob('*')) if path.is_file()}


@pytest.fixture(scope='module')
def whole(tmp_path_factory):
    """What an unbroken run with one worker makes of TEXTS. Not to be changed."""
    folder = tmp_path_factory.mktemp('whole')
    pack_texts(folder)
    return folder


@pytest.fixture
def small_batches(monkeypatch):
    """Many batches, and progress saved after each."""
    monkeypatch.setattr(encode, 'BATCH_DOCUMENTS', 20)
    monkeypatch.setattr(pack, 'SAVE_EVERY_S', -1)
    monkeypatch.setattr(os, 'fsync', lambda file: None)  # it matters where the power fails, and takes most of the time here
    monkeypatch.setattr('tqdm.tqdm.monitor_interval', 0)  # no thread whose lock a forked child could inherit

# -----------------------------------------------------------------------------
# pack

def test_files_hold_the_texts_with_eot_between_them(whole):
    meta = json.loads((whole / 'meta.json').read_text(encoding='utf-8'))
    for name in ('train', 'val'):
        texts = [text for text in TEXTS if text and split_by_hash(text, 0.1) == name]
        split = meta['splits'][name]
        shards = [np.fromfile(whole / shard['file'], dtype='<u2') for shard in split['shards']]
        assert [len(shard) for shard in shards] == [shard['tokens'] for shard in split['shards']]
        assert {len(shard) for shard in shards[:-1]} == {3000}
        ids = np.concatenate(shards)
        index = np.fromfile(whole / f'{name}.idx', dtype='<i8').reshape(-1, 2)
        documents = [bytes(ids[offset:offset + length].astype(np.uint8)) for offset, length in index]
        assert ids.tolist() == [i for n, text in enumerate(texts) for i in [256] * (n > 0) + list(text.encode())]
        assert documents == [text.encode() for text in texts]
        assert (split['tokens'], split['documents'], split['bytes']) == (len(ids), len(texts), len(''.join(texts).encode()))
    assert len(meta['splits']['train']['shards']) > 3


def test_threads_leave_no_trace_in_the_files(tmp_path, small_batches):
    for n_threads in (1, 3):
        pack_texts(tmp_path / str(n_threads), tokenizer=CHARS, n_threads=n_threads)
    assert files_of(tmp_path / '1') == files_of(tmp_path / '3')


@pytest.mark.skipif(not hasattr(os, 'fork'), reason='kills forked processes')
@pytest.mark.filterwarnings('ignore:This process')  # torch has threads, the child uses none of them
def test_killed_at_any_step_it_continues_to_the_same_bytes(whole, tmp_path, small_batches, monkeypatch):
    """A child is killed before its n-th change to a file, for every n until it lives through; the same call then continues."""
    monkeypatch.setattr(encode, 'BATCH_DOCUMENTS', 40)
    reads = []
    for n in range(1000):
        folder = tmp_path / str(n)
        if survives(n, lambda: pack_texts(folder)):
            break
        left = {name: content for name, content in files_of(folder).items() if not name.startswith('.packing/')}
        assert not left or left == files_of(whole) or json.loads(left['meta.json']) == {'format': 1, 'unfinished': True}
        pack_texts(folder, read=lambda start: reads.append(start) or records_of(TEXTS, start))
        assert files_of(folder) == files_of(whole), n
    assert n > 60 and len(set(reads)) > 8 and max(reads) > 300  # it did continue, from many places


def test_a_failed_run_keeps_its_progress_and_the_old_dataset(whole, tmp_path, small_batches):
    pack_texts(tmp_path, ['old'] * 9 + ['new text'] * 9, val_fraction=0.5)
    old = files_of(tmp_path)

    def failing(start):
        yield from records_of(TEXTS[:300], start)
        raise OSError('no space left on device')
    with pytest.raises(OSError, match='no space left'):
        pack_texts(tmp_path, read=failing)
    assert {name: content for name, content in files_of(tmp_path).items() if '/' not in name} == old
    starts = []
    pack_texts(tmp_path, read=lambda start: starts.append(start) or records_of(TEXTS, start))
    assert starts[0] > 200 and files_of(tmp_path) == files_of(whole)


@pytest.mark.parametrize('changed, error', [
    ({'shard_tokens': 2000}, 'shard_tokens=3000'),
    ({'min_chars': 10, 'val_fraction': 0.2}, 'val_fraction=0.1, min_chars=1'),
    ({'tokenizer': CharTokenizer('ab')}, "tokenizer={'kind': 'bytes'}")])
def test_an_unfinished_run_with_other_settings_is_not_continued(tmp_path, small_batches, changed, error):
    def failing(start):
        yield from records_of(TEXTS[:100])
        raise OSError('interrupted')
    with pytest.raises(OSError, match='interrupted'):
        pack_texts(tmp_path, read=failing)
    before = files_of(tmp_path)
    with pytest.raises(ValueError) as caught:
        pack_texts(tmp_path, **changed)
    assert str(caught.value) == (f'{tmp_path / ".packing"} holds an unfinished run with {error}: continue it with the same, '
                                 'or delete that folder to start over')
    assert files_of(tmp_path) == before


def test_max_docs_takes_the_first_ones(tmp_path):
    (tmp_path / 'a.jsonl').write_text('\n'.join(map(json.dumps, TEXTS)), encoding='utf-8')
    files, args = find_files([tmp_path / 'a.jsonl']), SimpleNamespace(field='text', errors='strict', encoding='utf-8')
    for start in (0, 60, 100):  # a killed run continues with the others
        assert [document.text for document in read_files(files, args, start, max_docs=100)] == TEXTS[start:100]


def test_the_rate_of_a_continued_run_leaves_out_what_was_read_before(tmp_path, monkeypatch):
    import tqdm
    bars = []

    class Bar(tqdm.tqdm):
        def __init__(self, *args, **settings):
            super().__init__(*args, **settings)
            bars.append(self)
    monkeypatch.setattr('tqdm.tqdm', Bar)
    (tmp_path / 'a.txt').write_text('a line\n' * 100_000, encoding='utf-8')
    args = SimpleNamespace(field='text', errors='strict', encoding='utf-8', max_docs=None)
    for start in (0, 90_000):
        assert len(list(read_files(find_files([tmp_path / 'a.txt'], 'lines'), args, start))) == 100_000 - start
    assert bars[0].initial == 0 and 600_000 < bars[1].initial < bars[1].n == 700_000


def test_the_split_follows_from_each_text_alone():
    texts = [f'text {n}' for n in range(20_000)]
    val = {text for text in texts if split_by_hash(text, 0.01) == 'val'}
    assert 150 < len(val) < 250  # 200 expected, standard deviation 14
    assert val < {text for text in texts if split_by_hash(text, 0.02) == 'val'}
    assert split_by_hash('text 0', 0.999) == 'val' and split_by_hash('text 0', 0.001) == 'train'
    # golden: another rule would move texts that somebody's run has trained on into validation
    assert [n for n in range(1000) if split_by_hash(f'text {n}', 0.01) == 'val'] == [
        62, 102, 130, 344, 350, 354, 519, 569, 708, 726, 874, 901, 960, 985]


def test_too_few_texts_for_validation_is_one_line_and_leaves_nothing(tmp_path):
    with pytest.raises(ValueError, match='^there is no text for the val split: give more text, or another --val_fraction$'):
        pack_texts(tmp_path, ['one', 'two'], val_fraction=1e-9)
    assert not files_of(tmp_path)


def test_what_a_thread_raises_reaches_the_caller(tmp_path):
    with pytest.raises(ValueError, match=r"^character 'c' \(U\+0063\) at position 1 is not among the 2 characters"):
        pack_texts(tmp_path, ['ab', 'bc'], CharTokenizer('ab'), n_threads=2)


@pytest.mark.skipif(not hasattr(os, 'fork'), reason='needs a second process')
@pytest.mark.filterwarnings('ignore:This process')  # torch has threads, the child uses none of them
def test_two_runs_into_one_folder(tmp_path, monkeypatch):
    monkeypatch.setattr('tqdm.tqdm.monitor_interval', 0)

    def another_run(start):
        child = os.fork()
        if child == 0:
            with contextlib.suppress(BaseException), pytest.raises(ValueError, match='another process is writing there'):
                pack_texts(tmp_path)
                os._exit(1)
            os._exit(0)
        assert os.waitpid(child, 0)[1] == 0
        yield from records_of(TEXTS, start)
    pack_texts(tmp_path, read=another_run)
    assert (tmp_path / 'meta.json').exists()


def test_the_loader_reads_shards_and_their_documents(tmp_path):
    pack_texts(tmp_path, tokenizer=CHARS)
    assert len(read_meta(tmp_path)['splits']['train']['shards']) > 3
    loader = Loader(tmp_path, 'train', block_size=8, batch_size=4, order='documents')
    loader.splits[0].verify()
    x, y, _ = loader.batch(0)
    assert x.shape == (4, 8) and (y != -100).any()

def write_llmc(path, ids):
    """A shard in llm.c's format: 256 int32 with magic, version and number of tokens, then uint16."""
    header = np.zeros(256, dtype='<i4')
    header[:3] = 20240520, 1, len(ids)
    path.write_bytes(header.tobytes() + np.array(ids, dtype='<u2').tobytes())


@pytest.mark.parametrize('train, val', [
    (['fineweb_train_000001.bin', 'fineweb_train_000002.bin'], 'fineweb_val_000000.bin'),
    (['train_000000.bin', 'train_000001.bin'], 'val_000000.bin'), (['TinyStories_train.bin'], 'TinyStories_val.bin')])
def test_shards_of_llmc_are_read(tmp_path, train, val):
    for n, name in enumerate(train):
        write_llmc(tmp_path / name, range(1000 * n, 1000 * n + 500))
    write_llmc(tmp_path / val, range(50_000, 50_257))
    loader = Loader(tmp_path, 'train', block_size=10, batch_size=20)
    assert loader.vocab_size == 50257 and loader.n_tokens == 500 * len(train)
    x, y, _ = loader.batch(0)
    assert (y == x + 1).all() and set((x // 1000).flatten().tolist()) == set(range(len(train)))
    assert Loader(tmp_path, 'val', block_size=256, batch_size=1, order='sequential').batch(0)[0].tolist() == [list(range(50_000, 50_256))]


def test_a_shard_of_llmc_that_was_cut_short_is_one_line(tmp_path):
    path = tmp_path / 'fineweb_train_000001.bin'
    write_llmc(path, range(500))
    path.write_bytes(path.read_bytes()[:-100])
    with pytest.raises(ValueError, match='expected 2024: it was cut short or altered'):
        Loader(tmp_path, 'train', block_size=10, batch_size=1)

# -----------------------------------------------------------------------------
# Parquet

def write_parquet(folder, texts, n_files=3, **options):
    """Files as those on the hub: a column 'text' beside others, in several row groups."""
    folder.mkdir(parents=True, exist_ok=True)
    size = -(-len(texts) // n_files)
    paths = [folder / f'train-{n:05d}-of-{n_files:05d}.parquet' for n in range(n_files)]
    for n, path in enumerate(paths):
        part = texts[n * size:(n + 1) * size]
        table = pa.table({'id': [f'{n}-{i}' for i in range(len(part))], 'text': pa.array(part, pa.string()), 'score': [0.5] * len(part)})
        pq.write_table(table, path, **{'row_group_size': 50, 'write_page_checksum': True, **options})
    return paths


# -----------------------------------------------------------------------------
# the scripts

def english(n_texts):
    """Texts of words, so that GPT-2's tokens are of a common length."""
    draw = random.Random(1)
    words = 'the of and a to in is you that it he was for on are with as his they at be this'.split()
    return [' '.join(draw.choice(words) for _ in range(draw.randrange(1, 80))) + '.' for _ in range(n_texts)]


@pytest.fixture(scope='module')
def corpus(tmp_path_factory):
    """A folder of Parquet files. Not to be changed."""
    folder = tmp_path_factory.mktemp('corpus')
    write_parquet(folder, english(6000))
    return folder


ARGS = ['--val_fraction=0.05', '--shard_tokens=5000']

# prepare.py as it is, but with small batches, progress saved after each, and a kill -9 when it has been saved n times
KILLED = """
import os, runpy, signal, sys
sys.path.insert(0, os.path.dirname(os.path.dirname(os.path.dirname(sys.argv[1]))))
from corpus import encode, pack, writer
encode.BATCH_DOCUMENTS, pack.SAVE_EVERY_S, write_bytes, left = 100, -1, writer.write_bytes, [int(sys.argv.pop())]
def write_and_die(path, *rest):
    write_bytes(path, *rest)
    left[0] -= 1
    if left[0] == 0:
        os.kill(os.getpid(), signal.SIGKILL)
writer.write_bytes = write_and_die
sys.argv = sys.argv[1:]
runpy.run_path(sys.argv[0], run_name='__main__')
"""


@needs_gpt2
@pytest.mark.skipif(os.name != 'posix', reason='needs kill -9')
def test_openwebtext_killed_and_continued_with_other_workers(data, tmp_path, corpus):
    script = data / 'openwebtext' / 'prepare.py'
    done = run(script, '--input', corpus, '--out', tmp_path / 'whole', '--workers=1', *ARGS, cwd=tmp_path, cache=MERGES.parent)
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines()[-1].startswith('next: python train.py --dataset=')
    killed = subprocess.run([sys.executable, '-c', KILLED, str(script), '--input', str(corpus), '--workers=2', *ARGS, '6'],
                            env={**os.environ, 'FLATGPT_CACHE': str(MERGES.parent)}, cwd=tmp_path, capture_output=True, timeout=600)
    assert killed.returncode == -signal.SIGKILL, killed.stderr  # and the pipes are closed: no worker lives on
    with pytest.raises(FileNotFoundError, match='is not prepared'):
        read_meta(data / 'openwebtext')
    done = run(script, '--input', corpus, '--workers=3', *ARGS, cwd=tmp_path, cache=MERGES.parent)
    assert done.returncode == 0, done.stderr
    assert 'openwebtext: continuing after ' in done.stdout
    names = sorted(files_of(tmp_path / 'whole'))
    assert 'train_000003.bin' in names and '.packing/progress' not in names
    assert filecmp.cmpfiles(tmp_path / 'whole', data / 'openwebtext', names, shallow=False) == (names, [], [])


@needs_gpt2
def test_fineweb_holds_tiktokens_ids_of_its_first_documents(data, tmp_path, corpus):
    args = ['--input', corpus, '--max_docs=200', '--workers=1', *ARGS]
    done = run(data / 'fineweb' / 'prepare.py', *args, cwd=tmp_path, cache=MERGES.parent)
    assert done.returncode == 0, done.stderr
    meta = read_meta(data / 'fineweb')
    assert (meta['vocab_size'], meta['dtype'], sum(split['documents'] for split in meta['splits'].values())) == (50257, 'uint16', 200)
    from tokens.tokenizer import GPT2Tokenizer
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv('FLATGPT_CACHE', str(MERGES.parent))
        bpe = GPT2Tokenizer().bpe
    val = [text for text in english(1000)[:200] if split_by_hash(text, 0.05) == 'val']
    assert np.frombuffer(contents(data / 'fineweb')[1]['val'], '<u2').tolist() == [
        i for n, text in enumerate(val) for i in [50256] * (n > 0) + bpe.encode_ordinary(text)]


@needs_gpt2
def test_shakespeare_has_nanogpts_counts(data, tmp_path):
    source = SHARED / 'english' / 'tinyshakespeare.txt'
    if not source.exists():
        pytest.skip(f'{source} is absent')
    (data / 'shakespeare' / 'input.txt').write_bytes(source.read_bytes())
    done = run(data / 'shakespeare' / 'prepare.py', cwd=tmp_path, cache=MERGES.parent)
    assert done.returncode == 0, done.stderr
    assert 'shakespeare/train: 301,966 tokens (uint16, vocabulary 50,257)' in done.stdout
    assert 'shakespeare/val: 36,059 tokens (uint16, vocabulary 50,257)' in done.stdout


def cut_short(folder):
    path = write_parquet(folder, TEXTS)[1]
    path.write_bytes(path.read_bytes()[:-100])
    return f'{path} could not be read ('


def other_columns(folder):
    pq.write_table(pa.table({'content': ['a'], 'text': [1]}), folder / 'a.parquet')
    return f"{folder / 'a.parquet'}, row 1: field 'text' holds 1, which is not text"


def flipped(folder):
    path = write_parquet(folder, TEXTS, compression='none', use_dictionary=False)[2]
    content = bytearray(path.read_bytes())
    content[content.index(TEXTS[-1].encode())] ^= 1
    path.write_bytes(content)
    return f'{path} could not be read (could not verify page integrity, CRC checksum verification failed'


def nothing(folder):
    return f'{folder}: nothing to read in this folder: .parquet files are looked for'


@needs_gpt2
@pytest.mark.parametrize('damage, args', [
    (cut_short, []), (other_columns, []), (flipped, ['--val_fraction=0.2']), (nothing, []),
    (write_parquet, ['--workers=0']), (write_parquet, ['--max_docs=0']), (write_parquet, ['--val_fraction=1.5'])],
    ids=['cut short', 'other columns', 'flipped', 'nothing', 'workers', 'max_docs', 'val_fraction'])
def test_bad_input_is_one_line_and_exit_2(tmp_path, monkeypatch, capsys, damage, args):
    folder = tmp_path / 'in'
    folder.mkdir()
    error = damage(folder) if damage is not write_parquet else args[0].replace('=', ': ') + ' must '
    code, stderr = prepare_here(monkeypatch, capsys, '--input', folder, '--out', tmp_path / 'out', '--workers=1', *args)
    assert code == 2 and stderr.startswith(error) and stderr.count('\n') == 1
    assert not (tmp_path / 'out' / 'meta.json').exists()


def prepare_here(monkeypatch, capsys, *args):
    """prepare.py of OpenWebText in this process: (exit code, stderr)."""
    from data.openwebtext import prepare
    monkeypatch.setenv('FLATGPT_CACHE', str(MERGES.parent))
    monkeypatch.setattr(sys, 'argv', ['prepare.py', *map(str, args)])
    with pytest.raises(SystemExit) as stop, prepare.one_line_errors():
        pack.prepare_parquet(prepare.HERE, prepare.__doc__, prepare.REPO, prepare.REVISION, prepare.FOLDER)
    return stop.value.code, capsys.readouterr().err

# -----------------------------------------------------------------------------
# the hub, and what stands in for it

class Hub(http.server.BaseHTTPRequestHandler):
    """As much of the Hugging Face hub as streaming asks for: the revision, the files in a folder, and ranges of their bytes."""
    files, asked = {}, []

    def do_GET(self):
        path = urllib.parse.unquote(urllib.parse.urlparse(self.path).path)
        self.asked.append(path)
        if path.startswith('/api/datasets/') and '/tree/' in path:
            content = json.dumps([{'type': 'file', 'path': f'plain_text/{name}', 'size': len(file), 'oid': '0' * 40}
                                  for name, file in self.files.items()]).encode()
        elif path.startswith('/api/datasets/'):
            content = json.dumps({'id': 'Skylion007/openwebtext', 'sha': path.split('/')[-1], 'siblings': [], 'tags': []}).encode()
        else:
            content = self.files[path.split('/')[-1]]
            first, last = map(int, self.headers['Range'].removeprefix('bytes=').split('-'))
            content = content[first:last + 1]
        self.send_response(206 if 'Range' in self.headers else 200)
        self.send_header('Content-Length', str(len(content)))
        self.end_headers()
        self.wfile.write(content)

    def log_message(self, *args):
        pass


@pytest.fixture
def hub(corpus):
    pytest.importorskip('huggingface_hub')
    Hub.files, Hub.asked = {path.name: path.read_bytes() for path in sorted(corpus.iterdir())}, []
    with http.server.ThreadingHTTPServer(('127.0.0.1', 0), Hub) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield f'http://127.0.0.1:{server.server_port}'
        server.shutdown()


@needs_gpt2
def test_the_pinned_revision_streams_from_a_mirror(data, tmp_path, corpus, hub, monkeypatch):
    script = data / 'openwebtext' / 'prepare.py'
    for name, value in {'HF_ENDPOINT': hub, 'HF_HUB_OFFLINE': '0', 'NO_PROXY': '*', 'HF_HOME': str(tmp_path / 'hf'),
                        'HF_HUB_ETAG_TIMEOUT': '300', 'HF_HUB_DOWNLOAD_TIMEOUT': '300'}.items():
        monkeypatch.setenv(name, value)
    args = ['--max_docs=300', '--workers=1', *ARGS]
    done = run(script, *args, cwd=tmp_path, cache=MERGES.parent)
    assert done.returncode == 0, done.stderr
    pinned = '79d93d786212f7344586290adb811d4ae6a1762c'
    assert all(f'/{pinned}' in path for path in Hub.asked if 'openwebtext' in path)
    assert {path.split('/')[-1] for path in Hub.asked if '/resolve/' in path} == {'train-00000-of-00003.parquet'}
    assert read_meta(data / 'openwebtext')['source'] == f'Skylion007/openwebtext, revision {pinned}, plain_text'
    run(script, '--input', corpus, '--out', tmp_path / 'local', *args, cwd=tmp_path, cache=MERGES.parent)
    assert contents(tmp_path / 'local')[1] == contents(data / 'openwebtext')[1]


@needs_gpt2
@pytest.mark.parametrize('name, value, why', [
    ('HF_HUB_OFFLINE', '1', 'offline mode is enabled'), ('HF_ENDPOINT', 'http://127.0.0.1:9', 'refused')])
def test_without_the_hub_one_line_names_input(data, tmp_path, monkeypatch, name, value, why):
    pytest.importorskip('huggingface_hub')
    monkeypatch.setenv('NO_PROXY', '*')
    monkeypatch.setenv(name, value)
    done = run(data / 'fineweb' / 'prepare.py', cwd=tmp_path, cache=MERGES.parent)
    assert done.returncode == 2 and done.stderr.count('\n') == 1
    assert done.stderr.startswith('HuggingFaceFW/fineweb is out of reach (') and why in done.stderr
    assert done.stderr.endswith('): bring the files sample/10BT/*.parquet of its revision 9bb295ddab0e here by other means, '
                                'and name their folder with --input\n')
    assert not (data / 'fineweb' / '.packing').exists()


@pytest.mark.skipif(not os.path.exists('/proc/self/status'), reason='needs Linux to say how much memory there was at most')
def test_memory_does_not_grow_with_the_input(tmp_path):
    """Not even where a file is a single row group, as those that pandas writes."""
    peaks_mb = []
    for n_mb in (64, 128):  # what the allocators hold on to is there with the first
        texts = pa.array([f'{n:b}'.translate({48: 'a', 49: 'b'}) + 'some bad cafe' * 750 for n in range(n_mb * 100)])
        pq.write_table(pa.table({'text': texts}), tmp_path / 'a.parquet', compression='none', use_dictionary=False)
        code = ('import re; from pathlib import Path; from types import SimpleNamespace; from corpus.pack import pack_files\n'
                'pack_files(SimpleNamespace(input=["a.parquet"], format="auto", field="text", errors="strict", encoding="utf-8", tokenizer="char", eot="", '
                'clean=False, min_chars=1, sample=1.0, val_fraction=0.5, shard_tokens=10**7, max_docs=None, workers=1, out=Path("out")), "")\n'
                'print(re.search(r"VmHWM:\\s*(\\d+)", open("/proc/self/status").read())[1])')
        done = subprocess.run([sys.executable, '-c', code], cwd=tmp_path, capture_output=True, text=True, encoding='utf-8',
                              env={**os.environ, 'PYTHONPATH': str(Path(pack.__file__).parents[1])})
        assert done.returncode == 0, done.stderr
        peaks_mb.append(int(done.stdout.split()[-1]) / 1024)
    assert peaks_mb[1] - peaks_mb[0] < 30, peaks_mb

# -----------------------------------------------------------------------------
# failures leave the old dataset as it was

def interrupted(folder, n_texts=300, **changed):
    """Leave an unfinished run of TEXTS in a folder."""
    def failing(start):
        yield from records_of(TEXTS[:n_texts], start)
        raise OSError('interrupted')
    with pytest.raises(OSError, match='interrupted'):
        pack_texts(folder, read=failing, **changed)
    return folder / '.packing'


def forged_number(work):
    digest, values = (work / 'progress').read_text(encoding='utf-8').split('\n')
    values = {**json.loads(values), 'documents': json.loads(values)['documents'] - 7}
    (work / 'progress').write_text(f'{digest}\n{json.dumps(values)}', encoding='utf-8')


def other_version(work):
    values = json.loads((work / 'progress').read_text(encoding='utf-8').split('\n')[1])
    del values['sizes']
    values = json.dumps(values)
    (work / 'progress').write_text(f'{writer.digest_of(values)}\n{values}', encoding='utf-8')


def cut_in_half(name):
    def damage(work):
        content = (work / name).read_bytes()
        (work / name).write_bytes(content[:len(content) // 2])
    return damage


def other_hashes(work):
    (work / 'seen').write_bytes(bytes((work / 'seen').stat().st_size))


@pytest.mark.parametrize('damage, reason', [
    (cut_in_half('progress'), 'progress was altered or cut short'),
    (lambda work: (work / 'progress').write_text('[1]'), 'progress was altered or cut short'),
    (forged_number, 'progress was altered or cut short'),
    (other_version, 'progress is of another version'),
    (cut_in_half('seen'), 'seen is shorter than the'),
    (other_hashes, 'seen was altered'),
    (lambda work: (work / 'train.idx').unlink(), 'train.idx is shorter than the'),
    (cut_in_half('train_000000.bin'), 'train_000000.bin is shorter than the')])
def test_an_unfinished_run_that_is_damaged_starts_over(tmp_path, small_batches, capsys, damage, reason):
    pack_texts(tmp_path / 'whole', clean=True)
    damage(interrupted(tmp_path / 'damaged', clean=True))
    capsys.readouterr()
    pack_texts(tmp_path / 'damaged', clean=True)
    first = capsys.readouterr().out.splitlines()[0]
    assert first.startswith(f'damaged: the unfinished run cannot be continued ({reason}') and first.endswith('): starting over')
    assert files_of(tmp_path / 'damaged') == files_of(tmp_path / 'whole')


def test_an_error_while_publishing_puts_the_old_dataset_back(whole, tmp_path, small_batches, monkeypatch):
    """Each rename in turn fails once. The same call then continues at the end of the corpus."""
    pack_texts(tmp_path, ['old'] * 9 + ['new text'] * 9, val_fraction=0.5)
    (tmp_path / 'train.mask').write_bytes(b'old')
    old, replace = files_of(tmp_path), os.replace
    for failing in range(100):
        renames = []

        def fail_once(source, target, failing=failing, renames=renames):
            if Path(target).parent == tmp_path:
                renames.append(target)
                if len(renames) == failing + 1:
                    raise OSError(5, 'Input/output error', str(target))
            replace(source, target)
        monkeypatch.setattr(os, 'replace', fail_once)
        try:
            pack_texts(tmp_path)
            break
        except OSError:
            assert {name: content for name, content in files_of(tmp_path).items() if '/' not in name} == old, failing
    assert failing > 5 and files_of(tmp_path) == files_of(whole)
