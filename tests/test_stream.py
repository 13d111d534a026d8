"""tokens/stream.py against the same text tokenized at once, and a run on raw text killed and resumed."""
import gzip
import json
import random

import numpy as np
import pytest
import torch
from conftest import TINY, differences, read_checkpoint, run_train, sentences, train_here
from hypothesis import given, settings
from hypothesis import strategies as st

from corpus.readers import find_files
from kernels import IGNORE
from tokens.stream import Head, Stream, Text, open_stream
from tokens.tokenizer import ByteTokenizer

EOT = ByteTokenizer().eot
TEXTS = [f'{n}: ' + sentences(random.Random(n).choice((5, 60, 700, 3000)), n) for n in range(40)] + ['天地玄黄' * 400]


@pytest.fixture(scope='module')
def shards(tmp_path_factory):
    """TEXTS in four files of four formats, the row of tokens that they make, and the files."""
    pq, pa = pytest.importorskip('pyarrow.parquet'), pytest.importorskip('pyarrow')
    folder = tmp_path_factory.mktemp('shards')
    (folder / 'a.txt').write_text(TEXTS[0], encoding='utf-8')
    (folder / 'b.jsonl').write_text(''.join(json.dumps({'text': text}) + '\n' for text in TEXTS[1:20]), encoding='utf-8')
    pq.write_table(pa.table({'text': TEXTS[20:30]}), folder / 'c.parquet', row_group_size=3)
    with gzip.open(folder / 'd.jsonl.gz', 'wt', encoding='utf-8') as file:
        file.writelines(json.dumps({'text': text}) + '\n' for text in TEXTS[30:])
    row = [token for text in TEXTS for token in (EOT, *text.encode())]
    return folder, np.array(row * 3)


def text_of(folder):
    return Text(find_files([folder]), ByteTokenizer())


def stream(folder, batch_size=4, **more):
    return Stream(text_of(folder), block_size=16, batch_size=batch_size, **{'shuffle_window': 7, **more})


def rows(loader, step, grad_accum=1):
    """The windows of a step, (rows, T + 1), in whatever order."""
    batches = [loader.batch(step, micro_step) for micro_step in range(grad_accum)]
    tokens = torch.cat([torch.cat((x, y[:, -1:]), dim=1) for x, y, _ in batches])
    assert all(torch.equal(x[:, 1:], y[:, :-1]) and x.dtype == y.dtype == torch.int64 for x, y, _ in batches)
    return sorted(tokens.tolist())


@pytest.mark.parametrize('window', [1, 7, 1300])
def test_windows_are_those_of_all_documents_in_a_row_shuffled_within_their_group(shards, window):
    folder, row = shards
    x, y, _ = stream(folder, shuffle_window=window).windows(np.arange(2 * window))
    expected = np.stack([row[n * 16:n * 16 + 17] for n in range(2 * window)]).tolist()
    found = torch.cat((x, y[:, -1:]), dim=1).tolist()
    for group in (slice(0, window), slice(window, 2 * window)):
        assert sorted(found[group]) == sorted(expected[group])
    assert (found == expected) == (window == 1)
    assert row[0] == EOT and len(row) // 3 < 2 * 1300 * 16  # the largest one goes into the second epoch


@pytest.mark.parametrize('prefetch', [False, True])
def test_any_number_of_ranks_sees_the_same_steps(shards, prefetch):
    alone = stream(shards[0], grad_accum=4)
    two = [stream(shards[0], grad_accum=2, rank=rank, world_size=2, prefetch=prefetch) for rank in range(2)]
    four = [stream(shards[0], rank=rank, world_size=4) for rank in range(4)]
    seen = []
    for step in range(12):
        seen.append(rows(alone, step, 4))
        assert seen[-1] == sorted(sum((rows(each, step, 2) for each in two), [])) == sorted(sum((rows(each, step) for each in four), []))
        assert alone.count_targets(step) == two[0].count_targets(step) == 16 * 16
    assert len({str(step) for step in seen}) == 12


@settings(max_examples=25, deadline=None)
@given(step=st.integers(0, 60), back=st.integers(0, 3))
def test_it_goes_on_from_a_position_as_if_never_stopped(shards, step, back):
    unbroken = stream(shards[0])
    for n in range(max(0, step - 2), step + 3):
        unbroken.batch(n)
    position = json.loads(json.dumps(unbroken.position(step)))
    assert (step * 4 - position['group'] * 7) in range(7)  # not from the beginning
    resumed = stream(shards[0], grad_accum=2, batch_size=2)  # the same global batch
    resumed.seek(position, step)
    for n in range(step, step + 4):
        assert rows(resumed, n, 2) == rows(unbroken, n)
    assert rows(resumed, max(step - back, 0), 2) == rows(unbroken, max(step - back, 0))  # a pure function of the step, also backwards


def test_what_was_seen_stays_seen_with_another_batch_size(shards):
    first, whole = stream(shards[0]), stream(shards[0], batch_size=40)
    seen = rows(first, 0) + rows(first, 1)
    then = stream(shards[0], batch_size=8)
    then.seek(first.position(2), 2)
    assert sorted(seen + sum((rows(then, step) for step in range(2, 6)), [])) == rows(whole, 0)
    new = stream(shards[0])
    new.seek(None, 1000)  # a run that was on other data before begins here at the beginning
    assert rows(new, 1000) == rows(first, 0)


def test_a_position_is_known_where_a_step_takes_hundreds_of_groups(shards):
    unbroken = stream(shards[0], batch_size=300, shuffle_window=1, prefetch=True)
    for step in range(3):
        unbroken.batch(step)
        assert unbroken.position(step)['group'] == 300 * step
    resumed = stream(shards[0], batch_size=300, shuffle_window=1)
    resumed.seek(unbroken.position(3), 3)
    assert rows(resumed, 3) == rows(unbroken, 3)


def test_a_position_of_the_first_edition_reads_the_same_windows(shards):
    # its positions had six numbers (epoch; file, bytes, lines, documents; tokens), which cannot be used here
    unbroken, resumed = stream(shards[0]), stream(shards[0])
    for step in range(9):
        unbroken.batch(step)
    resumed.seek({**unbroken.position(9), 'start': [0, 1, 4096, 0, 3, 17]}, 9)
    assert rows(resumed, 9) == rows(unbroken, 9)


def test_head_is_the_beginning_in_order_and_ends_with_the_text(shards):
    folder, row = shards
    head = Head(text_of(folder), 16, 10)
    x, y, _ = head.windows(np.array([3, 9]))
    assert head.n_windows == 10 and x.tolist() == [row[48:64].tolist(), row[144:160].tolist()] and y.tolist() == [row[49:65].tolist(), row[145:161].tolist()]
    whole, n = Head(text_of(folder), 16), len(row) // 3
    y = whole.windows(np.arange(whole.n_windows))[1]
    assert (y != IGNORE).sum() == n - 1 and y[y != IGNORE].tolist() == row[1:n].tolist()


def test_a_text_without_text_and_files_that_are_none(tmp_path):
    (tmp_path / 'a.txt').touch()
    (tmp_path / 'b.jsonl').write_text('{"text": ""}\n', encoding='utf-8')
    with pytest.raises(ValueError, match='b.jsonl: no text in there'):
        stream(tmp_path).batch(0)
    (tmp_path / 'rows').mkdir()
    for name in ('token_float32.npy', 'label_float32.npy'):
        np.save(tmp_path / 'rows' / name, np.zeros((2, 3), dtype=np.float32))
    with pytest.raises(ValueError, match='holds token ids, not text: pack it'):
        stream(tmp_path)


def test_a_broken_line_far_down_stops_the_batch_that_needs_it(tmp_path):
    (tmp_path / 'a.jsonl').write_text(''.join(json.dumps({'text': text}) + '\n' for text in TEXTS[:9]) + '{"content": "b"}\n', encoding='utf-8')
    loader = stream(tmp_path)
    with pytest.raises(ValueError, match=r"a.jsonl, line 10: no field 'text' with text, only content"):
        for step in range(10_000):
            loader.batch(step)
    with pytest.raises(ValueError, match='line 10: no field'):  # the same for whoever tries again
        loader.batch(step)
    (tmp_path / 'a.jsonl').write_text(''.join(json.dumps({'text': text}) + '\n' for text in TEXTS[:9]), encoding='utf-8')
    assert rows(loader, step) == rows(stream(tmp_path), step)


def test_the_first_file_is_for_validation_unless_another_is_named(shards, tmp_path):
    def opened(dataset, stream_val=''):
        train, _, val = open_stream(dataset, ByteTokenizer(), stream_val=stream_val, fields='text', errors='strict', n_eval=2,
                                    block_size=16, batch_size=4)
        return [path.rsplit('/', 1)[-1] for path in train.text.paths], bytes(val.tokens[1:8].tolist())
    folder = shards[0]
    first = TEXTS[0].encode()[:7]
    assert opened(f'stream:{folder}') == (['b.jsonl', 'c.parquet', 'd.jsonl.gz'], first)
    assert opened(f'stream:{folder / "c.parquet"},{folder / "b.jsonl"}', str(folder / 'a.txt')) == (['c.parquet', 'b.jsonl'], first)
    with pytest.raises(ValueError, match='is one file, which leaves none for validation: name text for that with --stream_val=PATH'):
        opened(f'stream:{folder / "a.txt"}')


def test_a_run_on_raw_text_that_was_stopped_ends_with_the_same_weights(shards, tmp_path):
    flags = (*TINY, f'--dataset=stream:{shards[0]}', '--tokenizer=byte', '--shuffle_window=10', '--dropout=0.1')
    code, out, err, metrics = train_here(*flags, out_dir=tmp_path / 'whole')
    assert code == 0, err
    assert 'encoded while training' in out and metrics[-1]['val_bpb'] < metrics[0]['val_bpb']
    assert train_here(*flags, '--max_iters=13', '--eval_interval=13', out_dir=tmp_path / 'two')[0] == 0
    code, out, err, _ = train_here('--init_from=resume', '--max_iters=20', '--eval_interval=5', '--device=cpu', out_dir=tmp_path / 'two')
    assert code == 0 and 'not the data that' not in out, err
    whole, two = (read_checkpoint(tmp_path / name / 'ckpt.pt') for name in ('whole', 'two'))
    assert whole['position']['window'] == 160 and not differences(whole['model'], two['model'])
    code, _, err, _ = train_here('--init_from=resume', '--max_iters=30', '--shuffle_window=11', out_dir=tmp_path / 'two')
    assert (code, err) == (2, 'shuffle_window=11: the checkpoint has shuffle_window=10, which cannot change\n')
    code, _, err, _ = train_here('--init_from=resume', '--max_iters=30', f'--dataset=stream:{shards[0]}/a.tyt', out_dir=tmp_path / 'two')
    assert code == 2 and err == f'{shards[0]}/a.tyt: no such file or folder\n'


@pytest.mark.full
def test_two_ranks_on_raw_text_train_as_one(shards, tmp_path):
    flags = (*TINY, f'--dataset=stream:{shards[0]}', '--tokenizer=byte', '--shuffle_window=10')
    one, two = (run_train(*flags, out_dir=tmp_path / str(n), n_proc=n) for n in (1, 2))
    assert one[0] == two[0] == 0, two[2]
    losses = [[line['loss'] for line in run[3] if 'loss' in line] for run in (one, two)]
    assert len(losses[0]) == 20 and losses[0] == pytest.approx(losses[1], rel=1e-5)
