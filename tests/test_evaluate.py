"""evaluate.py: against lm-evaluation-harness's own numbers, against the plain way to compute the same, and at any world size."""

import gzip
import http.server
import json
import math
import os
import random
import re
import subprocess
import sys
import threading
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import (
    CHARS,
    ROOT,
    TINY,
    differences,
    pack_chars,
    read_checkpoint,
    run_here,
    sentences,
    train_here,
)
from reference_lm_eval import MODELS, read_items, write_folder

import checkpoint
import distributed
from corpus.pack import write_dataset
from model import GPT
from report import table_row
from tasks import core, sources
from tasks.items import (
    TASKS,
    Benchmark,
    Item,
    arc,
    choice_accuracies,
    encode_pair,
    evaluate_task,
    hellaswag,
    lambada,
    mean_stderr,
    openbookqa,
    prepare,
)
from tokens.tokenizer import ByteTokenizer, CharTokenizer, GPT2Tokenizer, load_tokenizer
from training.scoring import RowScore, score_rows
from weights import pretrained

EVALS = ROOT / '../shared/data/evals'
PLACE = distributed.Place(0, 0, 1, torch.device('cpu'))


def rater(model, batch_tokens=512):
    return partial(score_rows, model, batch_tokens=batch_tokens, place=PLACE, autocast=torch.autocast('cpu', enabled=False))


# -----------------------------------------------------------------------------
# log-likelihoods


@pytest.mark.skipif(not EVALS.exists(), reason='needs ../shared/data/evals')
@pytest.mark.parametrize('kind', MODELS)
def test_every_item_is_scored_as_lm_evaluation_harness_scores_it(kind, tmp_path):
    reference = json.loads((Path(__file__).parent / 'reference_lm_eval.json').read_text(encoding='utf-8'))[kind]
    write_folder(tmp_path, kind)
    rate, tokenizer = rater(GPT.from_pretrained(tmp_path), 4096), load_tokenizer(pretrained.read_tokenizer(str(tmp_path)))
    assert tokenizer.prefix == ([tokenizer.bos] if kind == 'llama' else [])
    for name, expected in reference.items():
        items = read_items(EVALS, name, tokenizer, MODELS[kind], 80)
        benchmark, first = prepare(name, items, name, tokenizer=tokenizer), 0
        scores = rate(benchmark.rows, name)
        for item, theirs in zip(benchmark.items, expected['items'], strict=True):
            ours = scores[first:first + len(item.pairs)]
            first += len(item.pairs)
            nats = [score.log_likelihood for score in ours]
            assert nats == pytest.approx(theirs['nats'], abs=1e-3)
            verdict = dict(acc=ours[0].is_greedy) if name == 'lambada' else choice_accuracies([item], ours)
            assert np.argmax(nats) == np.argmax(theirs['nats']) and all(verdict[key] == theirs[key] for key in theirs.keys() - {'nats'})
        summary = evaluate_task(lambda rows, title: scores, name, benchmark)
        assert summary['n'] == len(items) and all(summary[key] == pytest.approx(value, rel=1e-4) for key, value in expected['summary'].items())


def test_what_is_scored_begins_where_the_context_by_itself_ends():
    tokenizer = GPT2Tokenizer()
    ids, start = encode_pair(tokenizer, 'The answer is ', 'forty-two')
    assert tokenizer.decode(ids[start:]) == ' forty-two', 'a space at the end of the context belongs to the word behind it'
    ids, start = encode_pair(tokenizer, '', ' x')
    assert (ids[0], start) == (tokenizer.eot, 1)
    assert encode_pair(CharTokenizer(CHARS), '', ' x')[0].tolist() == CharTokenizer(CHARS).encode('\n x')


def test_accuracies_by_sum_character_byte_and_token_differ_where_they_should():
    pairs, scores = [('', 'ab'), ('', 'ééé')], [RowScore(-3.0, False, 1), RowScore(-4.0, False, 2)]
    # -3 > -4, but per character -1.5 < -1.33, per byte -1.5 < -0.67, per token -3 < -2
    found = choice_accuracies([Item(pairs, 0)], scores)
    assert [found[key] for key in ('acc', 'acc_norm', 'acc_bytes', 'acc_tokens')] == [1, 0, 0, 0]
    assert mean_stderr('acc', [1, 0, 0, 1]) == {'acc': 0.5, 'acc_stderr': pytest.approx(math.sqrt(1 / 12))}
    assert mean_stderr('acc', [1]) == {'acc': 1.0}, 'one item says nothing about the error'


def test_perplexity_and_its_error_are_those_of_the_last_words():
    benchmark = Benchmark([Item([('a', 'b')], 0)] * 2, rows=[], source='x')
    found = evaluate_task(lambda rows, title: [RowScore(-2.0, True, 1), RowScore(-4.0, False, 2)], 'lambada', benchmark)
    assert found['perplexity'] == pytest.approx(math.exp(3)) and found['perplexity_stderr'] == pytest.approx(math.exp(3))  # the mean 3 is known to ±1
    one = evaluate_task(lambda rows, title: [RowScore(-2.0, True, 1)], 'lambada', Benchmark([Item([('a', 'b')], 0)], [], 'x'))
    assert 'perplexity_stderr' not in one and 'perplexity 7.3891' in table_row('lambada', one)


def test_hellaswag_loses_its_markup():
    item = dict(activity_label='A', ctx_a='One [step] two.', ctx_b='three', endings=['x [title] y  y', 'z'], label='1')
    assert hellaswag(item) == ([('A: One two. Three', 'x. y y'), ('A: One two. Three', 'z')], 1)


# -----------------------------------------------------------------------------
# CORE


@pytest.fixture
def bundle(tmp_path):
    """A CORE bundle of three small tasks."""
    folder = tmp_path / 'bundle'
    (folder / 'eval_data/sub').mkdir(parents=True)
    (folder / 'core.yaml').write_text('''icl_tasks:
- {label: mc, dataset_uri: sub/mc.jsonl, num_fewshot: [2], icl_task_type: multiple_choice, continuation_delimiter: "\\nAnswer: "}
- {label: schema, dataset_uri: schema.jsonl, num_fewshot: [0], icl_task_type: schema}
- {label: lm, dataset_uri: lm.jsonl, num_fewshot: [1], icl_task_type: language_modeling}
''', encoding='utf-8')
    (folder / 'eval_meta_data.csv').write_text('Eval Task,Task Category,Random baseline\nmc,x,25\nschema,x,50.0\nlm,x,0\n', encoding='utf-8')
    tasks = {'sub/mc': [dict(query=f'q{i}', choices=[f'a{i}', f'ab{i}', f'ac{i}'], gold=i % 3) for i in range(6)],
             'schema': [dict(context_options=[f'x{i}', f'yy{i}'], continuation='is it', gold=i % 2) for i in range(4)],
             'lm': [dict(context=f' c{i} ', continuation=f'd{i}') for i in range(3)]}
    for name, items in tasks.items():
        (folder / f'eval_data/{name}.jsonl').write_text(''.join(json.dumps(item) + '\n' for item in items), encoding='utf-8')
    return folder


def test_core_scores_the_right_tokens_behind_seeded_examples(bundle):
    tokenizer, seen = CharTokenizer(CHARS), {}

    def rate(rows, title):
        seen[title] = [(tokenizer.decode(ids[:start]), tokenizer.decode(ids[start:])) for ids, start in rows]
        # longer ends are less likely in sum, and more so per token
        return [RowScore(-len(ids[start:]) ** 0.5, title == 'lm', len(ids) - start) for ids, start in rows]

    tasks = core.read_core(bundle, CharTokenizer(CHARS))
    found = core.evaluate_core(rate, tokenizer, tasks, block_size=1000)
    assert [item.pairs[0][0] for item in tasks[0].items] == ['q1', 'q0', 'q3', 'q2', 'q5', 'q4'], 'random.Random(1337).shuffle'
    # before the first item, random.Random(1234).sample shows numbers 4 and 1 with their answers; the three choices share their first letter
    before = '\nq5\nAnswer: ac5\n\nq0\nAnswer: a0\n\nq1\nAnswer: a'
    assert seen['mc'][:3] == [(before, '1'), (before, 'b1'), (before, 'c1')]
    i = tasks[1].items[0].pairs[0][0][1]
    assert seen['schema'][:2] == [('\nx', f'{i} is it'), ('\nyy', f'{i} is it')], 'what the two texts share at their end'
    assert all(before.endswith(f'\n\nc{end[2]}') and end[:2] == ' d' for before, end in seen['lm']) and len(seen['lm']) == 3
    assert found['tasks']['lm']['acc'] == found['tasks']['lm']['centered'] == 1.0
    mc = found['tasks']['mc']
    assert mc['n'] == 6 and mc['centered'] == pytest.approx((mc['acc'] - 0.25) / 0.75)
    assert found['core'] == pytest.approx(np.mean([task['centered'] for task in found['tasks'].values()])) and found['n'] == 13


class CountedList(list):
    """Counts the items that are read."""
    n_read = 0

    def __getitem__(self, i):
        self.n_read += 1
        return super().__getitem__(i)

    def __iter__(self):
        self.n_read += len(self)
        return super().__iter__()


def test_core_draws_nanochats_examples_without_a_list_of_all_items_for_each():
    """A list of the other items was made for each: 8,000 items took 2.7 s, and 20,000 take 6 times that."""
    items = CountedList(core.Item([(f'{n},', 'a')]) for n in range(30))
    task = core.CoreTask('lm', 'language_modeling', 3, ' ', 0.0, items)
    tokenizer = CharTokenizer('0123456789,a \n')
    for i in (0, 7, 29):
        others = random.Random(1234 + i).sample([n for n in range(30) if n != i], 3)  # as nanochat does
        items.n_read = 0
        [(ids, _)] = core.rows_of(task, i, tokenizer, block_size=99)
        assert re.findall('[0-9]+', tokenizer.decode(ids)) == [str(n) for n in (*others, i)]
        assert items.n_read < 10


def test_core_cuts_to_the_last_tokens_and_says_what_is_wrong_with_a_bundle(bundle):
    tasks = core.read_core(bundle, CharTokenizer(CHARS))
    for ids, start in core.rows_of(tasks[0], 0, CharTokenizer(CHARS), block_size=8):
        assert len(ids) == 8 and CharTokenizer(CHARS).decode(ids[start:]) in ('1', 'b1', 'c1')
    with pytest.raises(ValueError, match='2 examples are shown before each of 2 items: give a larger --max_examples'):
        core.read_core(bundle, CharTokenizer(CHARS), max_examples=2)
    (bundle / 'core.yaml').write_text('tasks: []\n', encoding='utf-8')
    with pytest.raises(ValueError, match='is not a CORE bundle'):
        core.read_core(bundle, CharTokenizer(CHARS))


@pytest.mark.parametrize('file, content, message', [
    ('sub/mc', '', 'sub/mc.jsonl: ValueError: 2 examples are shown before each of 0 items'),
    ('sub/mc', '{"query": "q"}', r"sub/mc.jsonl, {'query': 'q'} as an item of multiple_choice: KeyError: 'choices'"),
    ('schema', '{"context_options": ["a", "b"], "continuation": "c", "gold": -1}', 'the right choice is number -1 of 2, counted from 0'),
    ('lm', '{"context": "weiß", "continuation": "x"}', r"lm.jsonl, .* character 'ß' \(U\+00DF\)"),
    ('lm', '[1, 2]', r'lm.jsonl, \[1, 2\] as an item of language_modeling: TypeError'),
])
def test_an_item_of_core_that_is_none_is_named_before_anything_is_scored(bundle, file, content, message):
    (bundle / f'eval_data/{file}.jsonl').write_text(content, encoding='utf-8')
    with pytest.raises(ValueError, match=message):
        core.read_core(bundle, CharTokenizer(CHARS))


def test_choices_without_a_token_of_their_own_end_no_evaluation(small):
    task = core.CoreTask('x', 'multiple_choice', n_shots=0, delimiter=' ', baseline=0.25, items=[Item([('q', 'a'), ('q', 'a')], 0)])
    found = core.evaluate_core(rater(small, 1), CharTokenizer(CHARS), [task], block_size=32)
    assert found['tasks']['x']['acc'] == 1.0  # nothing is said about them, and the first is taken, as nanochat does


# -----------------------------------------------------------------------------
# where items come from


def test_the_hub_or_its_mirror_is_asked_for_a_pinned_file(tmp_path, monkeypatch):
    import pyarrow
    import pyarrow.parquet
    items = [dict(goal='g', sol1='a', sol2='b', label=1)]
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(items), tmp_path / 'p.parquet')
    asked = []

    class Hub(http.server.BaseHTTPRequestHandler):
        def do_GET(self):
            asked.append(self.path)
            self.send_response(200)
            self.end_headers()
            self.wfile.write((tmp_path / 'p.parquet').read_bytes())

        def log_message(self, *args):
            pass
    server = http.server.HTTPServer(('127.0.0.1', 0), Hub)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    monkeypatch.setenv('HF_ENDPOINT', f'http://127.0.0.1:{server.server_port}/')
    monkeypatch.setenv('FLATGPT_CACHE', str(tmp_path / 'cache'))
    monkeypatch.setattr('corpus.fetch.TIMEOUT_S', 300)  # the machine may be busy
    for _ in range(2):
        assert sources.read_items(['piqa'])['piqa'] == (items, 'baber/piqa@142f6d7')
    server.shutdown()
    assert asked == ['/datasets/baber/piqa/resolve/142f6d7367fd9877f0fb3b5734ea6a545f54cdd1/piqa_validation.parquet'], 'the second time from the cache'
    monkeypatch.setenv('FLATGPT_OFFLINE', '1')
    with pytest.raises(OSError, match=r'hellaswag could not be fetched|hellaswag: .*FLATGPT_OFFLINE is set.*--eval_dir'):
        sources.read_items(['hellaswag'])


def test_files_of_the_package_are_read_as_the_items_of_their_own_datasets(tmp_path):
    import pyarrow
    items = [dict(goal='g', sol1='a', sol2='b', label=1)]
    stream = pyarrow.BufferOutputStream()
    with pyarrow.ipc.new_stream(stream, pyarrow.Table.from_pylist(items).schema) as writer:
        writer.write_table(pyarrow.Table.from_pylist(items))
    (tmp_path / 'x.arrow').write_bytes(stream.getvalue().to_pybytes())
    assert sources.read_file(tmp_path / 'x.arrow') == items
    question = dict(native_id='a', doc=dict(id='a', query='Question: Why?\nAnswer:', choices=['so', 'no', 'oh'], gold=2))
    word = dict(native_id=0, doc=dict(query='To be or not to', choices=['be'], answers_text=['be']))
    path = tmp_path / 'requests.jsonl.gz'
    path.write_bytes(gzip.compress('\n'.join(map(json.dumps, [question, question, word, word, question])).encode()))
    first, second = map(sources.own_form, sources.read_file(path))
    assert arc(first) == ([('Question: Why?\nAnswer:', choice) for choice in ('so', 'no', 'oh')], 2)
    assert openbookqa(first) == ([('Why?', choice) for choice in ('so', 'no', 'oh')], 2)
    assert lambada(second) == ([('To be or not to', 'be')], 0)


# -----------------------------------------------------------------------------
# the script


@pytest.fixture(scope='module')
def run_folder(tmp_path_factory, small):
    """An out_dir with a checkpoint of `small` and its dataset, and a folder of items."""
    folder = tmp_path_factory.mktemp('run')
    data = pack_chars(folder / 'data', sentences(2000, 1), sentences(1500, 2), CHARS)
    state = dict(model=small.state_dict(), optimizer={}, model_args=vars(small.config), iter_num=7, config=dict(dataset=str(data)),
                 tokenizer=CharTokenizer(CHARS).meta(), vocab_size=len(CHARS), format=checkpoint.FORMAT)
    checkpoint.CheckpointFolder(folder).save(state)
    (folder / 'items').mkdir()
    piqa = [dict(goal=f'goal {i}', sol1='do ' * (i + 1), sol2='not at all', label=i % 2) for i in range(9)]
    (folder / 'items/piqa.jsonl').write_text(''.join(json.dumps(item) + '\n' for item in piqa), encoding='utf-8')
    (folder / 'items/lambada_few.jsonl').write_text(json.dumps(dict(text='the cat sat here')) + '\n', encoding='utf-8')
    return folder


def run(*flags):
    code, stdout, stderr = run_here('evaluate.py', '--device=cpu', '--dtype=float32', *flags)
    assert code == 0, stderr
    return stdout


def test_two_processes_find_what_one_finds(run_folder, bundle):
    flags = [f'--out_dir={run_folder}', '--tasks=bpb,piqa,lambada', f'--eval_dir={run_folder / "items"}', f'--core={bundle}', '--batch_tokens=100']
    table = run(*flags)
    one = json.loads((run_folder / 'eval.json').read_text(encoding='utf-8'))
    launch = [sys.executable, '-m', 'torch.distributed.run', '--standalone', '--nproc_per_node=2', ROOT / 'evaluate.py']
    subprocess.run([*launch, *flags, '--device=cpu', '--dtype=float32', f'--results={run_folder / "two.json"}'], check=True, capture_output=True,
                   env={**os.environ, 'OMP_NUM_THREADS': '1'}, timeout=600)
    two = json.loads((run_folder / 'two.json').read_text(encoding='utf-8'))
    assert one['iter'] == two['iter'] == 7 and one['results'].keys() == {'bpb', 'piqa', 'lambada', 'core'}
    for name, numbers in one['results'].items():
        for key, value in numbers.items():
            assert two['results'][name][key] == (pytest.approx(value, rel=1e-5) if isinstance(value, float) else value)
    assert one['results']['piqa']['n'] == 9 and one['results']['bpb']['bytes'] == 1499
    assert 'perplexity' in table and 'core' in table and f'{run_folder}/eval.json: written' in table


def test_another_models_numbers_do_not_land_in_the_default_folder(monkeypatch, tmp_path, run_folder):
    monkeypatch.chdir(tmp_path)
    stdout = run(f'--checkpoint_path={run_folder}/ckpt.pt', '--tasks=bpb', '--max_examples=1')
    assert not (tmp_path / 'out').exists() and 'name a file with --results=FILE' in stdout
    run(f'--checkpoint_path={run_folder}/ckpt.pt', '--tasks=bpb', '--max_examples=1', '--out_dir=here')
    assert (tmp_path / 'here/eval.json').exists()


def test_bits_per_byte_are_of_the_windows_that_training_evaluated(tmp_path):
    tokenizer = ByteTokenizer()
    documents = [sentences(n, n) for n in range(20, 60)]
    write_dataset(tmp_path / 'data', tokenizer, {'train': documents, 'val': documents}, 'a test')
    for i, flags in enumerate((['--isolate_documents=True'], ['--sampling=documents'])):
        code, _, stderr, metrics = train_here(*TINY, f'--dataset={tmp_path / "data"}', '--max_iters=3', '--eval_iters=0', *flags, out_dir=tmp_path / str(i))
        assert code == 0, stderr
        run(f'--out_dir={tmp_path / str(i)}', '--tasks=bpb')
        found = json.loads((tmp_path / str(i) / 'eval.json').read_text(encoding='utf-8'))['results']['bpb']
        assert found['bpb'] == pytest.approx(metrics[-1]['val_bpb'], rel=1e-5) and found['loss'] == pytest.approx(metrics[-1]['val_loss'], rel=1e-5)


@pytest.mark.parametrize('flags, text', [
    (['--tasks=bpb,hellasvag'], "--tasks=bpb,hellasvag: 'hellasvag' is not a task, accepted are bpb, hellaswag, lambada"),
    (['--tasks='], '--tasks is empty and there is no --core: nothing to evaluate'),
    (['--tasks=copa', '--eval_dir={0}/items'], '{0}/items has no files for copa: one copa.jsonl is expected'),
    (['--tasks=lambada', '--eval_dir={0}'], '{0} has no files for lambada'),
    (['--max_examples=-1'], '--max_examples=-1 --batch_tokens=8192: accepted are 0 or more, and 1 or more'),
])
def test_errors(run_folder, flags, text):
    code, _, stderr = run_here('evaluate.py', '--device=cpu', f'--out_dir={run_folder}', *[flag.format(run_folder) for flag in flags])
    assert code == 2 and stderr.splitlines()[-1].startswith(text.format(run_folder))


def test_default_tasks_leave_out_what_the_tokenizer_cannot_write(monkeypatch, tmp_path, run_folder):
    flags = [f'--out_dir={run_folder}', f'--results={tmp_path / "r.json"}', '--max_examples=2']
    words = ''.join(sorted(set(sentences(2000, 1))))
    data = pack_chars(tmp_path / 'data', sentences(2000, 1), sentences(500, 2), words)
    assert train_here(*TINY, f'--dataset={data}', '--max_iters=1', out_dir=tmp_path / 'out')[0] == 0
    monkeypatch.setenv('FLATGPT_OFFLINE', '1')  # nothing has to be downloaded to know it
    stdout = run(f'--out_dir={tmp_path / "out"}', '--max_examples=2')
    assert re.search("^skipping hellaswag, lambada, .*openbookqa: character .* is not among the", stdout, re.M) and 'bpb' in stdout
    code, _, stderr = run_here('evaluate.py', '--device=cpu', f'--out_dir={tmp_path / "out"}', '--tasks=piqa', f'--eval_dir={run_folder / "items"}')
    assert code == 2 and 'piqa.jsonl: item 0 cannot be scored as one of piqa with this tokenizer (ValueError: character' in stderr

    for name in TASKS:  # one of them has a character too many
        monkeypatch.setitem(TASKS, name, lambda item: Item([(item['text'], 'x'), ('a', 'b')], 0))
        (tmp_path / f'{name}.jsonl').write_text(json.dumps(dict(text='é\x1b[2J' if name == 'copa' else 'e')) + '\n', encoding='utf-8')
    stdout = run(*flags, f'--eval_dir={tmp_path}')
    assert stdout.count('skipping') == 1 and "copa.jsonl: item 0 cannot be scored as one of copa with this tokenizer (ValueError: character 'é'" in stdout
    assert json.loads((tmp_path / 'r.json').read_text(encoding='utf-8'))['results'].keys() == {'bpb', *TASKS} - {'copa', 'arc_challenge'}


def test_a_byte_order_mark_is_no_part_of_an_item_or_a_bundle(tmp_path, bundle):
    (tmp_path / 'piqa.jsonl').write_bytes(b'\xef\xbb\xbf{"goal": "g"}\n')
    assert sources.from_folder('piqa', tmp_path)[0] == [dict(goal='g')]
    for path in (bundle / 'eval_meta_data.csv', bundle / 'core.yaml', bundle / 'eval_data/lm.jsonl'):
        path.write_bytes(b'\xef\xbb\xbf' + path.read_bytes())
    assert [task.baseline for task in core.read_core(bundle, CharTokenizer(CHARS))] == [0.25, 0.5, 0.0]


def test_an_empty_ending_is_never_taken_and_brings_no_warning(recwarn):
    item = hellaswag(dict(activity_label='A', ctx_a='one.', ctx_b='two', endings=['[header]', 'x'], label='1'))
    assert item.pairs[0][1] == ''
    numbers = choice_accuracies([item], [RowScore(-1.0, False, 1), RowScore(-9.0, False, 1)])
    assert (numbers['acc'], numbers['acc_norm'], numbers['acc_bytes']) == (0, 1, 1) and not recwarn.list


def test_an_error_of_zero_is_shown():
    assert table_row('piqa', dict(n=8, acc=1.0, acc_stderr=0.0)).endswith(' n       8   acc 1.0000 ±0.0000')


def test_a_name_from_a_bundle_cannot_steer_the_terminal():
    assert table_row('mc\x1b[2J', dict(n=1, acc=0.5)).startswith('mc\\x1b[2J ')


def test_an_item_that_is_none_is_named(tmp_path):
    with pytest.raises(ValueError, match=r"x.jsonl: item 1 cannot be scored as one of piqa with this tokenizer \(KeyError: 'label'\)"):
        prepare('piqa', [dict(goal='g', sol1='a', sol2='b', label=0), dict(goal='g', sol1='a', sol2='b')], 'x.jsonl', tokenizer=CharTokenizer(CHARS))
    with pytest.raises(ValueError, match=r"item 0 .* character 'ß' \(U\+00DF\) at position 3 is not among the 96"):
        prepare('lambada', [dict(text='wei\u00df es')], 'x.jsonl', tokenizer=CharTokenizer(CHARS))
    with pytest.raises(ValueError, match=r'item 0 .* the right choice is number -1 of 2'):  # a test split without its answers
        prepare('piqa', [dict(goal='g', sol1='a', sol2='b', label=-1)], 'x.jsonl', tokenizer=CharTokenizer(CHARS))
    (tmp_path / 'piqa.jsonl').write_bytes(b'{"a": 1}\n{')
    with pytest.raises(ValueError, match=r'piqa.jsonl, line 2: not JSON'):
        sources.from_folder('piqa', tmp_path)


# -----------------------------------------------------------------------------
# while training


@pytest.fixture(scope='module')
def dataset(tmp_path_factory):
    return pack_chars(tmp_path_factory.mktemp('tiny'), sentences(65 * 16, 1), sentences(500, 2), CHARS)


def numbers(metrics, key):
    return [(line['iter'], line[key]) for line in metrics if key in line]


def test_benchmarks_in_training_change_nothing_but_the_log(tmp_path, dataset, run_folder, bundle):
    hellaswag = [dict(activity_label='A', ctx_a='one.', ctx_b='two', endings=[f'end {i}' * k for k in (1, 2)], label='1') for i in range(3)]
    (run_folder / 'items/hellaswag.jsonl').write_text(''.join(json.dumps(item) + '\n' for item in hellaswag), encoding='utf-8')
    flags = [*TINY, '--arch=gpt2', f'--dataset={dataset}', '--dropout=0.1', '--max_iters=10']
    plain = train_here(*flags, out_dir=tmp_path / 'plain')
    scored = train_here(*flags, '--hellaswag_interval=3', '--lambada_interval=5', '--core_interval=10', f'--eval_dir={run_folder / "items"}',
                        f'--core={bundle}', out_dir=tmp_path / 'scored')
    assert plain[0] == scored[0] == 0, plain[2] + scored[2]
    states = [read_checkpoint(tmp_path / name / 'ckpt.pt') for name in ('plain', 'scored')]
    assert differences(*[{key: value for key, value in state.items() if key not in ('config', 'run_id')} for state in states]) == []
    assert [i for i, _ in numbers(scored[3], 'hellaswag_acc_norm')] == [0, 3, 6, 9, 10]
    assert [i for i, _ in numbers(scored[3], 'lambada_perplexity')] == [0, 5, 10] and len(numbers(scored[3], 'core')) == 2
    assert numbers(plain[3], 'loss') == numbers(scored[3], 'loss') and 'step 3: hellaswag' in scored[1]


def test_bits_per_byte_stand_beside_each_validation_loss(tmp_path, dataset):
    code, _, stderr, metrics = train_here(*TINY, f'--dataset={dataset}', '--max_iters=5', out_dir=tmp_path)
    assert code == 0, stderr
    for line in metrics:
        if 'val_loss' in line:  # a byte a token
            assert line['val_bpb'] == pytest.approx(line['val_loss'] / math.log(2))


def test_patience_stops_a_run_that_gets_no_better_and_a_resumed_one_alike(tmp_path, dataset):
    flags = [*TINY, f'--dataset={dataset}', '--patience=2', '--eval_interval=2', '--learning_rate=0', '--min_lr=0']  # nothing is learnt
    code, stdout, stderr, metrics = train_here(*flags, out_dir=tmp_path / 'a')
    assert code == 0 and 'no new best validation loss in 2 evaluations: stopping here (patience=2)' in stdout, stderr
    assert [i for i, _ in numbers(metrics, 'val_loss')] == [0, 2, 4, 6], 'the first counted is the best, two more are not'
    assert train_here(*flags, '--max_iters=4', out_dir=tmp_path / 'b')[0] == 0
    code, stdout, stderr, metrics = train_here('--init_from=resume', '--max_iters=20', out_dir=tmp_path / 'b')
    assert code == 0 and 'stopping here' in stdout, stderr
    assert [read_checkpoint(tmp_path / name / 'ckpt.pt')['iter_num'] for name in 'ab'] == [6, 6]


@pytest.mark.parametrize('flags, text', [
    (['--core_interval=5'], "core_interval=5 and core='' go together: the interval, and the folder of the CORE bundle"),
    (['--hellaswag_interval=5', '--eval_dir=nowhere'], 'nowhere has no files for hellaswag: one hellaswag.jsonl is expected'),
    (['--patience=-1'], 'patience=-1: accepted is 0 or more'),
])
def test_a_benchmark_that_cannot_run_stops_training_before_its_first_step(tmp_path, dataset, flags, text):
    code, _, stderr, metrics = train_here(*TINY, f'--dataset={dataset}', *flags, out_dir=tmp_path / 'x')
    assert code == 2 and stderr.strip().splitlines()[-1].startswith(text) and not (tmp_path / 'x').exists()
