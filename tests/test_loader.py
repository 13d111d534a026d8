"""tokens/loader.py: which tokens a step shows, to whom, how often; and what damaged data is told.

Most datasets here hold the ids 0, 1, 2 ... in order, so that an id says where it stands.
"""

import json
import os
import re
from pathlib import Path

import numpy as np
import pytest
import torch

from corpus.pack import write_dataset
from kernels import IGNORE
from tokens.dataset import Split, dataset_folders, parse_mixture
from tokens.loader import Loader
from tokens.tokenizer import CharTokenizer
from tokens.windows import count_of_each, permute

CHARS = ''.join(map(chr, range(0x4E00, 0x4E00 + 6000)))


def pack(folder, train, val=(range(300),), shard_tokens=None, chars=CHARS):
    """A dataset of the given documents, each a row of ids. A number stands for one document 0, 1, 2 ... of that length."""
    train, val = ([np.arange(s)] if isinstance(s, int) else [np.array(ids) for ids in s] for s in (train, val))
    write_dataset(folder, CharTokenizer(chars), {'train': train, 'val': val}, 'a test', shard_tokens)
    return folder


def starts(loader, n, first=0):
    """The first id of windows first .. first + n."""
    return loader.windows(np.arange(first, first + n))[0][:, 0].tolist()


def targets(loader, n):
    """All targets of the first n windows."""
    y = loader.windows(np.arange(n))[1]
    return y[y != IGNORE].tolist()


def error_of(folder, **settings):
    """The one line that opening and reading a dataset ends in."""
    with pytest.raises((ValueError, OSError)) as caught:
        loader = Loader(folder, 'train', **{**dict(block_size=4, batch_size=2), **settings})
        loader.windows(np.arange(loader.n_windows))
    message = str(caught.value).replace(f'{folder}{os.sep}', '').replace(str(folder), 'FOLDER')
    assert '\n' not in message
    return message


# -----------------------------------------------------------------------------
# the order


@pytest.mark.parametrize('n', [1, 2, 3, 4, 5, 7, 8, 9, 15, 16, 17, 100, 255, 256, 257, 1000, 4096, 4097])
def test_permute_is_a_bijection(n):
    image = permute(np.arange(n), n, (1, n))
    assert sorted(image.tolist()) == list(range(n))


def test_permute_leaves_no_trace_of_the_order():
    n = 10_000
    a, b = (permute(np.arange(n), n, (seed,)) for seed in (1, 2))
    for x, y in ((np.arange(n), a), (a[:-1], a[1:]), (a, b)):
        assert abs(np.corrcoef(x, y)[0, 1]) < 4 / np.sqrt(n)
    # a random permutation has about (1 - 1/e) times n different steps, as n balls fill n boxes; one line through them has few
    assert len(np.unique(np.diff(a) % n)) / n == pytest.approx(1 - np.exp(-1), abs=0.02)


@pytest.mark.parametrize('size', [5, 6, 8, 9, 11, 12, 100, 103])
def test_each_epoch_shows_each_window_once_from_a_phase_of_its_own(tmp_path, size):
    T = 4
    loader = Loader(pack(tmp_path, size), 'train', block_size=T, batch_size=2)
    n, phases, seen = loader.n_windows, set(), set()
    for epoch in range(200):
        first = starts(loader, n, epoch * n)
        phase = min(first)
        assert sorted(first) == list(range(phase, phase + n * T, T))
        phases.add(phase)
        seen |= {t for start in first for t in range(start, start + T + 1)}
    assert phases == set(range(size - n * T))
    assert seen == set(range(size))  # the last token too
    assert size - T * (n + 2) < T  # and hardly more than one window is left out of an epoch


def test_epochs_come_in_different_orders(tmp_path):
    loader = Loader(pack(tmp_path, 1000), 'train', block_size=4, batch_size=2)
    n = loader.n_windows
    orders = {tuple(np.argsort(starts(loader, n, epoch * n))) for epoch in range(10)}
    assert len(orders) == 10


def test_the_order_is_what_it_was(tmp_path):
    # recorded with this version: a change means that a run resumed across it sees other tokens than an unbroken one
    pack(tmp_path, 5000)
    golden = {'shuffle': [2673, 801, 4577, 4545, 241, 2145], 'random': [4454, 4767, 4022, 980, 1404, 3112]}
    assert {order: starts(Loader(tmp_path, 'train', block_size=16, batch_size=2, order=order, seed=1337), 6) for order in golden} == golden


@pytest.mark.parametrize('order', ['shuffle', 'random', 'documents'])
def test_a_batch_is_a_function_of_the_step(tmp_path, order):
    pack(tmp_path, [range(i, i + 30) for i in range(0, 900, 30)])
    settings = dict(block_size=8, batch_size=3, grad_accum=2, order=order, seed=5)
    steps = [(step, micro_step) for step in range(30) for micro_step in range(2)]
    plain = Loader(tmp_path, 'train', **settings)
    expected = {at: plain.batch(*at) for at in steps}
    shuffled = np.random.default_rng(0).permutation(steps).tolist()
    for calls in (steps, shuffled, steps[::-1], [steps[7]] * 3):
        for prefetch in (False, True):
            loader = Loader(tmp_path, 'train', prefetch=prefetch, **settings)
            for at in calls:
                x, y, _ = loader.batch(*at)
                assert torch.equal(x, expected[tuple(at)][0]) and torch.equal(y, expected[tuple(at)][1])


def test_the_seed_changes_the_order(tmp_path):
    pack(tmp_path, 1000)
    for order in ('shuffle', 'random', 'documents'):
        first = [Loader(pack(tmp_path, [range(i, i + 9) for i in range(0, 900, 9)]), 'train', block_size=8, batch_size=4, order=order, seed=seed).batch(0)[0]
                 for seed in (1, 2)]
        assert not torch.equal(*first)


@pytest.mark.parametrize('order', ['shuffle', 'random', 'documents'])
def test_every_world_size_sees_the_same_tokens_in_a_step(tmp_path, order):
    pack(tmp_path, [range(i, i + 1 + i % 23) for i in range(0, 2000, 37)])
    mask = np.random.default_rng(0).integers(2, size=Split(tmp_path, 'train').n_tokens, dtype=np.uint8)
    (tmp_path / 'train.mask').write_bytes(mask.tobytes())
    rows = 12
    steps = {}
    for world_size, grad_accum in ((1, 1), (1, 4), (2, 1), (2, 3), (3, 2), (4, 3)):
        for step in (0, 3, 17):  # 17 is epochs later
            parts, counts = [], set()
            for rank in range(world_size):
                loader = Loader(tmp_path, 'train', block_size=8, batch_size=rows // world_size // grad_accum,
                                grad_accum=grad_accum, rank=rank, world_size=world_size, order=order)
                parts += [torch.cat(loader.batch(step, micro_step)[:2], dim=1) for micro_step in range(grad_accum)]
                counts.add(loader.count_targets(step))
            seen = torch.cat(parts)
            assert counts == {int((seen[:, 8:] != IGNORE).sum())}
            steps.setdefault(step, []).append(sorted(seen.tolist()))
    for seen in steps.values():
        assert all(rows == seen[0] for rows in seen)


def test_count_targets_of_plain_text_is_every_token_of_the_step(tmp_path):
    loader = Loader(pack(tmp_path, 1000), 'train', block_size=8, batch_size=3, grad_accum=2, world_size=2)
    assert loader.count_targets(5) == 3 * 2 * 2 * 8


def test_targets_are_the_tokens_that_follow(tmp_path):
    for order in ('shuffle', 'random', 'sequential', 'documents'):
        loader = Loader(pack(tmp_path, 400), 'train', block_size=16, batch_size=5, order=order)
        x, y, _ = loader.batch(2)
        assert x.shape == y.shape == (5, 16) and x.dtype == y.dtype == torch.int64
        assert x.is_contiguous() and y.is_contiguous()
        assert torch.equal(y[y != IGNORE], x[y != IGNORE] + 1)


# -----------------------------------------------------------------------------
# the other orders


@pytest.mark.parametrize('size', [5, 6, 8, 9, 10, 50])
def test_sequential_scores_every_token_once(tmp_path, size):
    loader = Loader(pack(tmp_path, size), 'train', block_size=4, batch_size=2, order='sequential')
    assert targets(loader, loader.n_windows) == list(range(1, size))
    assert starts(loader, loader.n_windows) == list(range(0, size - 1, 4))


def test_a_short_last_window_is_padded(tmp_path):
    x, y, _ = Loader(pack(tmp_path, 7), 'train', block_size=4, batch_size=2, order='sequential').batch(0)
    assert x.tolist() == [[0, 1, 2, 3], [4, 5, 6, 0]]
    assert y.tolist() == [[1, 2, 3, 4], [5, 6, IGNORE, IGNORE]]


def test_random_draws_every_start_and_no_other(tmp_path):
    loader = Loader(pack(tmp_path, 12), 'train', block_size=4, batch_size=2, order='random')
    first = starts(loader, 4000)
    assert set(first) == set(range(8))
    assert np.bincount(first).min() > 400  # 500 each, give or take 4 deviations


def test_documents_begin_rows(tmp_path):
    # T = 4: a long document goes on in a second row and a third, a short one leaves a rest, one token has no target
    documents = [range(0, 3), range(10, 11), range(20, 31), [], range(40, 45)]
    loader = Loader(pack(tmp_path, documents), 'train', block_size=4, batch_size=2, order='documents')
    x, y, _ = loader.windows(np.arange(loader.n_windows))
    _ = IGNORE
    rows = {(0, 1, 2, 0): (1, 2, _, _), (20, 21, 22, 23): (21, 22, 23, 24), (24, 25, 26, 27): (25, 26, 27, 28),
            (28, 29, 30, 0): (29, 30, _, _), (40, 41, 42, 43): (41, 42, 43, 44)}
    assert dict(zip(map(tuple, x.tolist()), map(tuple, y.tolist()))) == rows and len(x) == len(rows)


def test_end_of_text_is_learnt_where_a_row_is_a_document(tmp_path):
    class Letters(CharTokenizer):
        eot = 3
    write_dataset(tmp_path, Letters('abcd'), {'train': ['ab', 'ca', 'bb'], 'val': ['ab']}, 'made here')
    x, y, _ = Loader(tmp_path, 'train', block_size=4, batch_size=3, order='documents').batch(0)
    rows = sorted((a[0], *b) for a, b in zip(x.tolist(), y.tolist()))
    assert rows == [(0, 1, 3, -100, -100), (1, 1, -100, -100, -100), (2, 0, 3, -100, -100)]


def test_documents_come_once_an_epoch_in_orders_of_their_own(tmp_path):
    loader = Loader(pack(tmp_path, [range(i, i + 3) for i in range(0, 300, 3)]), 'train', block_size=4, batch_size=2, order='documents')
    epochs = [starts(loader, 100, 100 * epoch) for epoch in range(3)]
    assert all(sorted(epoch) == list(range(0, 300, 3)) for epoch in epochs)
    assert len(set(map(tuple, epochs))) == 3


@pytest.mark.parametrize('order', ['shuffle', 'random', 'sequential', 'documents'])
def test_the_mask_says_which_tokens_are_targets(tmp_path, order):
    pack(tmp_path, [range(0, 30), range(30, 70)], shard_tokens=50)
    mask = np.random.default_rng(1).integers(2, size=70, dtype=np.uint8)
    (tmp_path / 'train.mask').write_bytes(mask.tobytes())
    loader = Loader(tmp_path, 'train', block_size=8, batch_size=4, order=order)
    x, y, _ = loader.windows(np.arange(loader.n_windows))
    known = (y != IGNORE).numpy()
    # an unmasked loader of the same order knows where padding is
    (tmp_path / 'train.mask').unlink()
    plain = Loader(tmp_path, 'train', block_size=8, batch_size=4, order=order).windows(np.arange(loader.n_windows))[1].numpy()
    assert np.array_equal(known, np.where(plain == IGNORE, False, mask[np.maximum(plain, 0)] == 1))
    assert np.array_equal(y.numpy()[known], plain[known])


# -----------------------------------------------------------------------------
# shards and mixtures


@pytest.mark.parametrize('order', ['shuffle', 'random', 'sequential', 'documents'])
def test_windows_stay_within_their_shard(tmp_path, order):
    # shards 0-39, 40-79, 80-119, 120-122; the third document lies in three of them
    pack(tmp_path, [range(0, 35), range(35, 36), range(36, 85), range(85, 123)], shard_tokens=40)
    assert len(Split(tmp_path, 'train').shards) == 4
    loader = Loader(tmp_path, 'train', block_size=6, batch_size=4, order=order)
    for epoch in range(20):
        x, y, _ = loader.windows(np.arange(loader.n_windows) + epoch * loader.n_windows)
        last = torch.where(y == IGNORE, -1, y).max(dim=1).values
        assert torch.equal(x[:, 0] // 40, last // 40)
    if order == 'sequential':
        assert targets(loader, loader.n_windows) == [t for t in range(123) if t % 40]
    if order == 'documents':
        first_tokens = {0, 35, 36, 85, 40, 80, 120}  # of documents, and of what a border leaves of them
        assert sorted(targets(loader, loader.n_windows)) == sorted(set(range(123)) - first_tokens)


def test_a_shard_too_short_for_a_window_is_left_out(tmp_path):
    loader = Loader(pack(tmp_path, 43, shard_tokens=40), 'train', block_size=8, batch_size=4)
    assert max(starts(loader, 200)) < 40


@pytest.mark.parametrize('weights', [[0.7, 0.3], [0.6, 0.3, 0.1], [0.985, 0.01, 0.005]])
def test_a_mixture_keeps_its_shares_and_repeats_nothing(tmp_path, weights):
    sizes = (200, 1500, 900)
    folders = [pack(tmp_path / name, [np.arange(size) + 2000 * k]) for k, (name, size) in enumerate(zip('abc', sizes))][:len(weights)]
    loader = Loader(folders, 'train', block_size=4, batch_size=2, weights=weights)
    first = np.array(starts(loader, 12_000))
    source = first // 2000
    for at in range(0, 11_000, 137):
        assert np.abs(np.bincount(source[at:at + 1000], minlength=len(weights)) / 1000 - weights).max() < 0.01
    for k, folder in enumerate(folders):  # as if it were alone, whatever stands between its windows
        own, n = first[source == k], loader.sources[k].n
        assert all(len(set(epoch)) == n for epoch in np.split(own, range(n, len(own), n)) if len(epoch) == n)


@pytest.mark.parametrize('order', ['sequential', 'documents'])
def test_evaluation_goes_through_all_folders_whatever_their_weights(tmp_path, order):
    folders = [pack(tmp_path / 'a', 50), pack(tmp_path / 'b', [range(100, 400)])]
    loader = Loader(folders, 'train', block_size=8, batch_size=4, order=order, weights=[0.9, 0.1] if order == 'sequential' else None)
    assert sorted(targets(loader, loader.n_windows)) == [*range(1, 50), *range(101, 400)]


@pytest.mark.parametrize('weights', [[0.5, 0.5], [0.6, 0.3, 0.1], [0.25] * 4, [0.9, 0.05, 0.03, 0.02], [1 / 3, 0.00021, 0.66645667]])
def test_shares_of_a_mixture_do_not_drift(weights):
    g = np.arange(30_000)
    counts = count_of_each(weights, g)
    assert (counts.sum(axis=0) == g).all()
    assert set(np.diff(counts, axis=1).ravel().tolist()) <= {0, 1}
    for far in (0, 10**6, 10**12):  # a pattern rounded to 1/1000 was off by 10**12 / 3000 there
        exact = (far + g) * np.array(weights)[:, None] / sum(weights)
        assert np.abs(count_of_each(weights, far + g) - exact).max() < 2


@pytest.mark.parametrize('dataset, expected', [
    ('a', (['a'], [1.0])),
    ('a:0.7,b:0.3', (['a', 'b'], [0.7, 0.3])),
    (' a : 3 , b:1 ', (['a ', 'b'], [0.75, 0.25])),
    ('a,b', (['a', 'b'], [0.5, 0.5])),
    (r'C:\texts', ([r'C:\texts'], [1.0])),
    (r'C:\texts:1e1,/x/y:10', ([r'C:\texts', '/x/y'], [0.5, 0.5])),
])
def test_parse_mixture(dataset, expected):
    assert parse_mixture(dataset) == expected


@pytest.mark.parametrize('dataset, part', [('', ''), ('a,', ''), ('a:', 'a:'), ('a:x', 'a:x'), (':0.5', ':0.5'), ('a:0', 'a:0'), ('a:1,b:-1', 'b:-1'),
                                           ('a:nan', 'a:nan'), ('a:inf', 'a:inf')])
def test_parse_mixture_refuses(dataset, part):
    with pytest.raises(ValueError) as caught:
        parse_mixture(dataset)
    assert str(caught.value) == f'dataset={dataset}: {part!r} is no NAME or NAME:WEIGHT with a weight above 0, such as zhwiki:0.7'


def test_dataset_folders(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    data = Path(__file__).resolve().parent.parent / 'data'
    assert dataset_folders('shakespeare_char:1,nowhere:3') == ([data / 'shakespeare_char', data / 'nowhere'], [0.25, 0.75])
    (tmp_path / 'here' / 'mine').mkdir(parents=True)
    assert dataset_folders('here/mine')[0] == [Path('here/mine')]
    assert dataset_folders(str(tmp_path / 'here'))[0] == [Path('here')]
    monkeypatch.chdir(data.parent)
    assert dataset_folders('shakespeare_char')[0] == [Path('data/shakespeare_char')]


# -----------------------------------------------------------------------------
# foreign formats


def test_ids_past_65536(tmp_path):
    chars = ''.join(map(chr, range(0x10000, 0x10000 + 70_000)))
    loader = Loader(pack(tmp_path, [range(69_000, 70_000)], chars=chars), 'train', block_size=8, batch_size=4, order='sequential')
    assert targets(loader, loader.n_windows) == list(range(69_001, 70_000))
    assert os.path.getsize(tmp_path / 'train.bin') == 4000


def write_llmc(path, ids, magic=20240520, version=1, count=None):
    header = np.zeros(256, dtype='<i4')
    header[:3] = magic, version, len(ids) if count is None else count
    path.write_bytes(header.tobytes() + np.array(ids, dtype='<u2').tobytes())


def test_shards_of_llmc(tmp_path):
    write_llmc(tmp_path / 'train_000001.bin', range(50))
    write_llmc(tmp_path / 'train_000002.bin', range(50, 90))
    write_llmc(tmp_path / 'val_000000.bin', range(20))
    loader = Loader(tmp_path, 'train', block_size=7, batch_size=4, order='sequential')
    assert loader.n_tokens == 90 and loader.vocab_size == 50257
    assert targets(loader, loader.n_windows) == [t for t in range(90) if t not in (0, 50)]


def test_a_folder_of_nanogpt(tmp_path):
    import pickle
    for split in ('train', 'val'):
        (np.arange(100, dtype=np.uint16) % 3).tofile(tmp_path / f'{split}.bin')
    assert Loader(tmp_path, 'val', block_size=8, batch_size=4).vocab_size == 50257
    (tmp_path / 'meta.pkl').write_bytes(pickle.dumps(dict(vocab_size=3, itos={0: 'a', 1: 'b', 2: 'c'}, stoi=dict(a=0, b=1, c=2))))
    loader = Loader(tmp_path, 'val', block_size=8, batch_size=4)
    assert loader.vocab_size == 3 and loader.tokenizer_meta == {'kind': 'char', 'chars': 'abc'}
    assert loader.batch(0)[0].max() == 2


# -----------------------------------------------------------------------------
# what bad data gets: one line each


def test_a_shard_cut_short_or_longer(tmp_path):
    pack(tmp_path, 100)
    path = tmp_path / 'train.bin'
    whole = path.read_bytes()
    for data in (whole[:-1], whole[:-2], whole[:50], b'', whole + b'\0\0', bytes(1024) + whole):
        path.write_bytes(data)
        assert error_of(tmp_path) == (f'train.bin has {len(data)} bytes, expected 200: it was cut short or altered, '
                                      'prepare the dataset again')


def test_a_header_of_llmc_that_does_not_fit(tmp_path):
    write_llmc(tmp_path / 'train.bin', range(50), count=60)
    assert error_of(tmp_path) == ('train.bin has 1124 bytes, expected 1144: it was cut short or '
                                  'altered, prepare the dataset again')


def test_a_missing_shard(tmp_path):
    pack(tmp_path, 100, shard_tokens=40)
    (tmp_path / 'train_000001.bin').unlink()
    assert error_of(tmp_path) == 'train_000001.bin is missing: a dataset is a folder with train.bin and val.bin'


def test_a_split_that_is_not_there(tmp_path):
    np.arange(100, dtype=np.uint16).tofile(tmp_path / 'train.bin')
    with pytest.raises(ValueError, match=re.escape(f'{tmp_path} has no val split, only train: prepare it with one')):
        Loader(tmp_path, 'val', block_size=4, batch_size=2)


def test_a_split_too_short_for_a_window(tmp_path):
    too_short = 'FOLDER: the train split has no shard of 9 tokens or more: use a smaller --block_size or more text'
    for order in ('shuffle', 'random', 'sequential'):
        pack(tmp_path, 8)
        assert error_of(tmp_path, block_size=8, order=order) == too_short
        pack(tmp_path, 20, shard_tokens=8)
        assert error_of(tmp_path, block_size=8, order=order) == too_short
        pack(tmp_path, 9)
        Loader(tmp_path, 'train', block_size=8, batch_size=2, order=order).batch(0)


def test_an_id_beyond_the_vocabulary(tmp_path):
    pack(tmp_path, 100, shard_tokens=40)
    tokens = np.fromfile(tmp_path / 'train_000001.bin', dtype='<u2')
    tokens[7] = 6000
    tokens.tofile(tmp_path / 'train_000001.bin')
    for order in ('shuffle', 'sequential', 'documents'):
        assert error_of(tmp_path, order=order) == ('train_000001.bin offset 7: token id 6000 is beyond vocab_size 6000: the shard was made with '
                                                   'another tokenizer or altered, prepare the dataset again')


def test_documents_need_an_index_that_fits(tmp_path):
    pack(tmp_path, [range(50), range(50, 100)])
    path = tmp_path / 'train.idx'
    for at, offset, length in ((0, -1, 3), (1, 98, 3), (1, 50, -1), (0, 2**63 - 1, 1), (1, 2**62, 2**62), (0, -2**63, -2**63)):
        table = np.array([[0, 50], [50, 50]], dtype='<i8')
        table[at] = offset, length
        path.write_bytes(table.tobytes())
        assert error_of(tmp_path, order='documents') == (
            f'train.idx: the document of length {length} at token {offset} overlaps the next one or the end of the split at 100: '
            'it was cut short or altered, prepare the dataset again')
    path.write_bytes(bytes(24))
    assert error_of(tmp_path, order='documents') == ('train.idx has 24 bytes, expected 16: it was cut short or altered, '
                                                     'prepare the dataset again')
    path.write_bytes(b'')
    nothing = 'FOLDER: the train split has no document of 2 tokens or more: use a smaller --block_size or more text'
    assert error_of(tmp_path, order='documents') == nothing
    assert error_of(pack(tmp_path, [[1], [2]]), order='documents') == nothing
    path.unlink()
    assert error_of(tmp_path, order='documents') == ('train.idx is missing: rows that begin with documents need it, prepare the dataset with one')


def test_a_mask_that_does_not_fit(tmp_path):
    pack(tmp_path, 100)
    (tmp_path / 'train.mask').write_bytes(bytes(99))
    assert error_of(tmp_path) == ('train.mask has 99 bytes, expected 100: it was cut short or altered, '
                                  'prepare the dataset again')


def test_mixtures_that_cannot_be(tmp_path):
    a, b = pack(tmp_path / 'a', 100), pack(tmp_path / 'b', 100, chars=CHARS[1:])
    with pytest.raises(ValueError, match=re.escape(f'{a}, {b} were packed with different tokenizers: pack them with one')):
        Loader([a, b], 'train', block_size=4, batch_size=2, weights=[0.5, 0.5])


def test_verify_finds_an_altered_token(tmp_path):
    pack(tmp_path, 100, shard_tokens=40)
    split = Split(tmp_path, 'train')
    split.verify()
    data = bytearray((tmp_path / 'train_000002.bin').read_bytes())
    data[-1] ^= 4
    (tmp_path / 'train_000002.bin').write_bytes(data)
    with pytest.raises(ValueError, match=re.escape(f'{tmp_path / "train_000002.bin"} does not match its checksum in meta.json: it was cut short or altered')):
        Split(tmp_path, 'train').verify()


def test_the_fingerprint_is_of_plain_values_and_knows_the_data(tmp_path):
    a = Loader(pack(tmp_path / 'a', 100), 'train', block_size=4, batch_size=2).fingerprint()
    assert json.loads(json.dumps(a)) == a == Loader(pack(tmp_path / 'b', 100), 'train', block_size=8, batch_size=4, order='random').fingerprint()
    assert a != Loader(pack(tmp_path / 'c', [range(1, 101)]), 'train', block_size=4, batch_size=2).fingerprint()
