"""tokens/dataset.py and tokens/metapkl.py: what is read of honest, foreign and hostile folders."""

import json
import os
import pickle
import re
import subprocess
import sys

import numpy as np
import pytest
from conftest import ROOT

from corpus.pack import write_dataset
from tokens.dataset import Split, dataset_folders, open_array, read_meta
from tokens.loader import Loader
from tokens.tokenizer import CharTokenizer, load_tokenizer


def write_meta(folder, **changes):
    meta = {'format': 1, 'dtype': 'uint16', 'vocab_size': 3, 'tokenizer': {'kind': 'char', 'chars': 'abc'}, 'source': 'test',
            'splits': {'train': {'tokens': 4, 'bytes': 4, 'documents': 1,
                                 'shards': [{'file': 'train.bin', 'tokens': 4, 'crc32': 7}]}}}
    (folder / 'train.bin').write_bytes(bytes(8))
    (folder / 'meta.json').write_text(json.dumps(meta | changes), encoding='utf-8')
    return meta


def test_meta_json_is_read_as_written(tmp_path):
    meta = write_meta(tmp_path)
    assert read_meta(tmp_path) == meta | {'origin': 'meta.json'}


def split(**changes):
    return {'train': {'tokens': 4, 'bytes': 4, 'documents': 1, 'shards': [{'file': 'train.bin', 'tokens': 4}]} | changes}


def shard(**changes):
    return split(shards=[{'file': 'train.bin', 'tokens': 4, 'crc32': 7} | changes])


@pytest.mark.parametrize('key, changes', [
    ('packing this dataset was interrupted', {'unfinished': True}),
    ('format must be 1', {'format': 2}),
    ('dtype must be', {'dtype': 'int8'}),
    ('dtype must be', {'dtype': ['uint16']}),
    ('vocab_size must be 3', {'vocab_size': 4}),
    ('tokenizer: ', {'tokenizer': {'kind': 'char', 'chars': 'aab'}}),
    ('tokenizer: ', {'tokenizer': None}),
    ("dtype must be 'uint32'", {'tokenizer': {'kind': 'char', 'chars': ''.join(map(chr, range(70000, 140000)))},
                                    'vocab_size': 70000}),
    ("'shards'", {'splits': split() | {'te\nst': {}}}),
    ('file must be', {'splits': shard(file='../train.bin')}),
    ('file must be', {'splits': shard(file='/etc/passwd')}),
    ('file must be', {'splits': shard(file='a\\b.bin')}),
    ('tokens must be', {'splits': shard(tokens=4.0)}),
    ("'tokens'", {'splits': split(shards=[{'file': 'train.bin'}])}),
])
def test_meta_json_that_does_not_fit_is_one_line_with_file_and_key(tmp_path, key, changes):
    write_meta(tmp_path, **changes)
    with pytest.raises(ValueError, match=re.escape(f'{tmp_path / "meta.json"}: {key}')) as caught:
        read_meta(tmp_path)
    assert '\n' not in str(caught.value)


@pytest.mark.parametrize('text', ['', '[1]', '{"format": 1', '[' * 100_000, '\xff'])
def test_meta_json_that_is_no_object(tmp_path, text):
    write_meta(tmp_path)
    (tmp_path / 'meta.json').write_text(text, encoding='latin-1')
    with pytest.raises(ValueError, match='meta.json'):
        read_meta(tmp_path)

# -----------------------------------------------------------------------------
# folders of nanoGPT and llm.c

def nanogpt_folder(folder, meta=None):
    np.array([0, 1, 2, 1], dtype=np.uint16).tofile(folder / 'train.bin')
    np.array([2, 2], dtype=np.uint16).tofile(folder / 'val.bin')
    if meta is not None:
        (folder / 'meta.pkl').write_bytes(meta if isinstance(meta, bytes) else pickle.dumps(meta))


@pytest.mark.parametrize('protocol', range(pickle.HIGHEST_PROTOCOL + 1))
def test_honest_meta_pkl(tmp_path, protocol):
    chars = '\n \u00e9'
    meta = {'vocab_size': 3, 'itos': dict(enumerate(chars)), 'stoi': {char: i for i, char in enumerate(chars)}}
    nanogpt_folder(tmp_path, pickle.dumps(meta, protocol))
    found = read_meta(tmp_path)
    assert found['tokenizer'] == {'kind': 'char', 'chars': chars} and found['vocab_size'] == 3 and found['origin'] == 'meta.pkl'
    assert found['splits']['train'] == {'tokens': 4, 'bytes': None, 'documents': None,
                                        'shards': [{'file': 'train.bin', 'tokens': 4, 'crc32': None}]}
    assert found['splits']['val']['tokens'] == 2


class Hostile:
    def __init__(self, *call):
        self.call = call

    def __reduce__(self):
        return self.call

    def __repr__(self):  # names the test, without an address, so that parallel workers collect the same names
        return 'Hostile'


@pytest.mark.parametrize('protocol', range(pickle.HIGHEST_PROTOCOL + 1))
def test_hostile_meta_pkl_runs_nothing(tmp_path, protocol):
    nanogpt_folder(tmp_path, pickle.dumps({'itos': Hostile(os.system, (f'touch {tmp_path}/ran',))}, protocol))
    with pytest.raises(ValueError, match=r"meta.pkl: not a meta.pkl of nanoGPT: it asks for '\w+.system', and only plain values"):
        read_meta(tmp_path)
    assert not (tmp_path / 'ran').exists()


@pytest.mark.parametrize('meta', [
    b'', b'garbage', b'\x80\x05K\x01', [], {'itos': {}}, {'itos': {0: 'a', 2: 'b'}}, {'itos': {0: 5}},
    {'itos': {0: 'a', 1: 'a'}, 'stoi': {'a': 1}}, {'itos': {0: 'a'}, 'stoi': {'b': 0}}, {'itos': {0: '\ud800'}, 'stoi': {'\ud800': 0}}, {'itos': {0: Hostile(bytearray, (10 ** 12,))}},
], ids=repr)
def test_unfit_meta_pkl_is_one_line(tmp_path, meta):
    nanogpt_folder(tmp_path, meta)
    with pytest.raises(ValueError, match='meta.pkl: ') as caught:
        read_meta(tmp_path)
    assert '\n' not in str(caught.value)


def test_without_any_meta_the_ids_are_gpt2s(tmp_path):
    nanogpt_folder(tmp_path)
    found = read_meta(tmp_path)
    assert found['origin'] == 'none' and found['tokenizer']['kind'] == 'gpt2' and found['vocab_size'] == 50257


def test_shards_of_llmc_are_counted_without_their_header(tmp_path):
    for i in (1, 0):
        header = np.zeros(256, dtype=np.int32)
        header[:3] = 20240520, 1, 5
        (tmp_path / f'train_{i:06d}.bin').write_bytes(header.tobytes() + np.arange(5, dtype=np.uint16).tobytes())
    train = read_meta(tmp_path)['splits']['train']
    assert train['tokens'] == 10 and [shard['file'] for shard in train['shards']] == ['train_000000.bin', 'train_000001.bin']


def test_odd_number_of_bytes(tmp_path):
    (tmp_path / 'train.bin').write_bytes(b'abc')
    with pytest.raises(ValueError, match='train.bin: 3 bytes is no whole number of uint16 tokens'):
        read_meta(tmp_path)


def test_dataset_that_is_not_prepared(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(FileNotFoundError) as caught:
        read_meta('data/absent')
    assert str(caught.value) == 'data/absent/train.bin is missing: a dataset is a folder with train.bin and val.bin'
    folder = tmp_path / 'data/shakespeare_char'
    folder.mkdir(parents=True)
    (folder / 'prepare.py').touch()
    with pytest.raises(FileNotFoundError) as caught:
        read_meta('data/shakespeare_char')
    assert str(caught.value) == 'data/shakespeare_char is not prepared: run python data/shakespeare_char/prepare.py'


# -----------------------------------------------------------------------------
# nanoGPT datasets of any tokenizer


ITOS = ['a', 'b', ' c']
STOI = {token: i for i, token in enumerate(ITOS)}


@pytest.mark.parametrize('meta, tokenizer', [
    ({'vocab_size': 3}, {'kind': 'ids', 'vocab_size': 3}),
    ({'vocab_size': np.int64(3)}, {'kind': 'ids', 'vocab_size': 3}),
    ({'vocab_size': 3, 'itos': list('abc')}, {'kind': 'char', 'chars': 'abc'}),
    ({'vocab_size': 64, 'itos': list('abc')}, {'kind': 'char', 'chars': 'abc'}),  # rounded up
    ({'vocab_size': 3, 'itos': ITOS, 'stoi': STOI}, {'kind': 'itos', 'itos': ITOS}),
    ({'vocab_size': 3, 'itos': dict(enumerate(ITOS))}, {'kind': 'itos', 'itos': ITOS}),
    ({'vocab_size': np.int32(3), 'itos': {np.int64(i): c for i, c in enumerate('abc')},
      'stoi': {c: np.uint16(i) for i, c in enumerate('abc')}}, {'kind': 'char', 'chars': 'abc'}),
], ids=repr)
@pytest.mark.parametrize('protocol', [3, 4, 5])
def test_meta_pkl_of_any_tokenizer(tmp_path, meta, tokenizer, protocol):
    nanogpt_folder(tmp_path, pickle.dumps(meta, protocol))
    assert read_meta(tmp_path)['tokenizer'] == tokenizer and read_meta(tmp_path)['vocab_size'] == 3
    assert Loader(tmp_path, 'train', block_size=2, batch_size=1).vocab_size == 3
    if tokenizer['kind'] != 'ids':
        made = load_tokenizer(tokenizer)
        assert made.decode([0, 1, 2]).startswith('ab') and made.encode('ba') == [1, 0]


def test_numbers_of_numpy_other_than_integers_are_refused(tmp_path):
    for value in (np.float64(3), np.array([3]), np.datetime64(3, 's')):
        nanogpt_folder(tmp_path, {'vocab_size': value})
        with pytest.raises(ValueError, match='meta.pkl: not a meta.pkl of nanoGPT: '):
            read_meta(tmp_path)


def nested(depth):
    """A pickle of {((...),(...)): 0}, each tuple holding the one below twice, without the memory that takes."""
    return b'\x80\x04}' + b'K\x00' + b''.join(b'q%c0h%ch%c\x86' % (i, i, i) for i in range(depth)) + b'K\x00s.'


def test_values_nested_60_deep_are_refused_at_once(tmp_path):
    hostile = b'dtype('
    as_value = (b'\x80\x04}\x8c\x0avocab_sizeK\x00' + b''.join(b'q%c0]h%cah%ca' % (i, i, i) for i in range(60)) + b's.')
    as_arguments = (b'\x80\x04}cnumpy\ndtype\n' + b'K\x00' + b''.join(b'q%c0h%ch%c\x86' % (i, i, i) for i in range(60))
                    + b'\x85Rs.')
    hostiles = (nested(60), as_arguments, as_value, hostile, b'\x80\x04Nr\xff\xff\xff\xff.')
    for i, data in enumerate(hostiles):
        (tmp_path / str(i)).mkdir()
        nanogpt_folder(tmp_path / str(i), data)
    # in a process, because the fault is one that no signal handler ends
    script = f"""from tokens.dataset import read_meta
for i in range({len(hostiles)}):
    try:
        read_meta(f'{tmp_path}/{{i}}')
    except ValueError as error:
        print(error)
"""
    done = subprocess.run([sys.executable, '-c', script], cwd=ROOT, capture_output=True, text=True, timeout=600)
    assert done.stdout.count('meta.pkl: not a meta.pkl of nanoGPT') == len(hostiles), done.stderr


# -----------------------------------------------------------------------------
# shards of llm.c, and ids of other widths


def write_llmc(path, ids, magic, version, dtype):
    header = np.zeros(256, dtype='<i4')
    header[:3] = magic, version, len(ids)
    path.write_bytes(header.tobytes() + np.array(ids, dtype=dtype).tobytes())


def test_shards_of_llmc_for_llama3(tmp_path):
    ids = [*range(40), 128_000, 128_255]
    for split in ('train', 'val'):
        write_llmc(tmp_path / f'fineweb_{split}_000001.bin', ids, 20240801, 7, '<u4')
    loader = Loader(tmp_path, 'train', block_size=41, batch_size=1, order='sequential')
    assert loader.batch(0).y[0].tolist() == ids[1:] and loader.vocab_size == 128_256
    (tmp_path / 'meta.pkl').write_bytes(pickle.dumps({'vocab_size': 200_000}))
    assert read_meta(tmp_path)['vocab_size'] == 200_000


@pytest.mark.parametrize('magic, version', [(20240520, 2), (20240801, 1), (20251231, 1)])
def test_an_unknown_header_is_an_error(tmp_path, magic, version):
    write_llmc(tmp_path / 'train.bin', range(50), magic, version, '<u2')
    with pytest.raises(ValueError, match=rf'train.bin has an unknown header \(magic number {magic}, version {version}\)'):
        read_meta(tmp_path)


@pytest.mark.parametrize('dtype, high', [('<u4', 50_256), ('<i8', 50_256), ('<u4', 128_000)])
def test_ids_of_more_than_two_bytes_without_meta_json_are_refused(tmp_path, dtype, high):
    np.random.default_rng(0).integers(high, size=5000).astype(dtype).tofile(tmp_path / 'train.bin')
    with pytest.raises(ValueError, match='train.bin: every second number is zero or .* ids of 4 or 8 bytes'):
        read_meta(tmp_path)
    np.random.default_rng(0).integers(high % 2**16, size=5000).astype('<u2').tofile(tmp_path / 'train.bin')
    assert read_meta(tmp_path)['splits']['train']['tokens'] == 5000


# -----------------------------------------------------------------------------
# files that change, many files, checksums, documents


def pack(folder, n=4000, shard_tokens=None):
    chars = ''.join(map(chr, range(0x4E00, 0x4E00 + 5000)))
    write_dataset(folder, CharTokenizer(chars), {'train': [np.arange(n)], 'val': [np.arange(50)]}, 'a test', shard_tokens)
    return folder


@pytest.mark.parametrize('suffix', ['bin', 'mask'])
def test_a_file_cut_short_during_training_is_named(tmp_path, suffix):
    pack(tmp_path)
    (tmp_path / 'train.mask').write_bytes(bytes([1]) * 4000)
    loader = Loader(tmp_path, 'train', block_size=9, batch_size=4, order='sequential')
    loader.batch(0)
    os.truncate(tmp_path / f'train.{suffix}', 100)
    with pytest.raises(ValueError, match=rf'train.{suffix} was replaced or changed since the dataset was opened'):
        loader.batch(90)


def test_a_shard_rewritten_in_place_during_training_is_named(tmp_path):
    pack(tmp_path)
    loader = Loader(tmp_path, 'train', block_size=9, batch_size=4, order='sequential')
    loader.batch(0)
    path, before = tmp_path / 'train.bin', (tmp_path / 'train.bin').stat()
    with open(path, 'r+b') as f:
        f.write(bytes(before.st_size))
    os.utime(path, ns=(before.st_atime_ns, before.st_mtime_ns + 10**9))
    assert (path.stat().st_ino, path.stat().st_size) == (before.st_ino, before.st_size)
    with pytest.raises(ValueError, match='train.bin was replaced or changed since the dataset was opened'):
        loader.batch(1)


def test_a_shard_replaced_during_training_is_not_mixed_in(tmp_path):
    pack(tmp_path, shard_tokens=10)  # 400 shards, more than are open at a time
    loader = Loader(tmp_path, 'train', block_size=9, batch_size=4, order='sequential')
    before = loader.windows(np.arange(400)).x
    (tmp_path / 'new').write_bytes(bytes(20))
    os.replace(tmp_path / 'new', tmp_path / 'train_000399.bin')  # open: the old file is still read
    assert (loader.windows(np.arange(399, 400)).x == before[-1:]).all()
    (tmp_path / 'new').write_bytes(bytes(20))
    os.replace(tmp_path / 'new', tmp_path / 'train_000003.bin')  # closed meanwhile
    with pytest.raises(ValueError, match='train_000003.bin was replaced or changed since the dataset was opened'):
        loader.windows(np.arange(5))


def test_400_shards_where_256_files_may_be_open(tmp_path):
    resource = pytest.importorskip('resource')
    pack(tmp_path, shard_tokens=10)
    limits = resource.getrlimit(resource.RLIMIT_NOFILE)
    open_array.cache_clear()
    resource.setrlimit(resource.RLIMIT_NOFILE, (256, limits[1]))
    try:
        loader = Loader(tmp_path, 'train', block_size=9, batch_size=4, order='sequential')
        assert loader.windows(np.arange(400)).x[:, 0].tolist() == list(range(0, 4000, 10))
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, limits)


def test_verify_data_says_whether_checksums_are_known(tmp_path):
    split = Split(pack(tmp_path / 'a', shard_tokens=1000), 'train')
    assert split.describe_checksums() == f'{tmp_path}/a, train: verifying 4,000 tokens'
    (tmp_path / 'b').mkdir()
    nanogpt_folder(tmp_path / 'b')
    assert Split(tmp_path / 'b', 'train').describe_checksums() == f'{tmp_path}/b, train: not verified, its shards have no checksum in meta.json'


def test_documents_that_overlap_are_refused(tmp_path):
    pack(tmp_path)
    for table, length in (([[0, 50], [49, 50]], 50), ([[60, 9], [0, 61]], 61)):
        np.array(table, dtype='<i8').tofile(tmp_path / 'train.idx')
        with pytest.raises(ValueError, match=f'train.idx: the document of length {length} at token 0 overlaps the next one'):
            Split(tmp_path, 'train').documents()
    np.array([[60, 9], [0, 60]], dtype='<i8').tofile(tmp_path / 'train.idx')  # in another order, side by side
    assert Split(tmp_path, 'train').documents()[1].tolist() == [60, 9]


# -----------------------------------------------------------------------------
# the dataset setting


def test_a_misspelt_dataset_is_corrected(tmp_path):
    pack(tmp_path / 'shakespeare')
    with pytest.raises(FileNotFoundError, match=f', did you mean {tmp_path / "shakespeare"}\\?'):
        read_meta(tmp_path / 'shakespear')


def test_data_slash_name_is_the_dataset_of_that_name(monkeypatch):
    monkeypatch.chdir(ROOT)
    for name in ('shakespeare_char', 'nowhere'):
        assert dataset_folders(f'data/{name}')[0] == dataset_folders(name)[0]
