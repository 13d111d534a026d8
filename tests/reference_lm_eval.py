"""What lm-evaluation-harness 0.4.13 gives for the models of tests/test_evaluate.py: writes tests/reference_lm_eval.json.

    python -m venv ref && ref/bin/pip install -r requirements.txt lm_eval==0.4.13 accelerate
    ref/bin/python tests/reference_lm_eval.py ../shared/data/evals                     # the models of MODELS
    ref/bin/python tests/reference_lm_eval.py ../shared/data/evals FOLDER all.json     # any model folder, all items

The harness runs its own task files on its HFLM (float32, CPU, batches of 8). Only where the items come from is ours: `include` takes
the harness's YAML whole, and dataset_path becomes a local JSONL of the same fields. LAMBADA's text is put together from its two parts.
The file keeps numbers only: per item the log-likelihood of each choice and whether acc, acc_norm are right.
"""

import json
import sys
import tempfile
from pathlib import Path

import torch

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

MODELS = {'gpt2': 25, 'llama': 10, 'qwen3': 10}  # items of each task
TASK_FILES = dict(hellaswag='hellaswag/hellaswag.yaml', lambada='lambada/lambada_openai.yaml', arc_easy='arc/arc_easy.yaml', piqa='piqa/piqa.yaml',
                  winogrande='winogrande/default.yaml', copa='super_glue/copa/default.yaml', openbookqa='openbookqa/openbookqa.yaml')


def random_model(name='gpt2', vocab_size=50304, block_size=80):
    """A model of seeded weights, so large that its guesses are far from even, and so short that long rows are cut."""
    from model import GPT, GPTConfig
    shape = dict(block_size=block_size, vocab_size=vocab_size, n_layer=2, n_head=2, n_embd=16)
    if name != 'gpt2':
        shape |= dict(arch='llama', n_head=4, n_kv_head=2, n_embd=24, n_hidden=40)
    if name == 'qwen3':
        shape |= dict(qk_norm=True, tied=True, head_size=10, rope_theta=1e6, norm_eps=1e-6)
    model = GPT(GPTConfig(**shape))
    draw = torch.Generator().manual_seed(8)
    with torch.no_grad():
        for name, p in model.named_parameters():
            if p.dim() > 1:
                p.normal_(std=0.5, generator=draw)
    return model


def write_folder(folder, name):
    """Write a model as another program would: GPT-2's tokenizer, or its first 2,000 merges as Llama 3 and Qwen cut and begin a text."""
    from corpus.fetch import fetch
    from tokens.tokenizer import (
        GPT2_MERGES_SHA256,
        GPT2_MERGES_SOURCES,
        GPT2Tokenizer,
        load_tokenizer,
        read_tokenizer_json,
    )
    from tokens.tokenizer_json import bpe_json, read_merges
    from weights.gguf import LLAMA3_PATTERN, QWEN2_PATTERN
    if name == 'gpt2':
        random_model().save_pretrained(folder, GPT2Tokenizer())
        return
    merges = read_merges(fetch('vocab.bpe', GPT2_MERGES_SOURCES, GPT2_MERGES_SHA256)).splitlines()[:2000]
    pattern, special, roles = QWEN2_PATTERN, ['<|endoftext|>', '<|im_start|>', '<|im_end|>'], dict(eos_token='<|im_end|>', pad_token='<|endoftext|>')
    if name == 'llama':
        pattern, special = LLAMA3_PATTERN, ['<|begin_of_text|>', '<|end_of_text|>']
        roles = dict(bos_token=special[0], eos_token=special[1])
    content = bpe_json('\n'.join(merges), pattern, special)
    if name == 'llama':
        bos = {'id': special[0], 'ids': [256 + len(merges)], 'tokens': special[:1]}
        single = [{'SpecialToken': {'id': special[0], 'type_id': 0}}, {'Sequence': {'id': 'A', 'type_id': 0}}]
        content['post_processor'] = {'type': 'TemplateProcessing', 'single': single, 'pair': single + [{'Sequence': {'id': 'B', 'type_id': 1}}],
                                     'special_tokens': {special[0]: bos}}
    Path(folder).mkdir(exist_ok=True)
    (Path(folder) / 'tokenizer.json').write_text(json.dumps(content), encoding='utf-8')
    (Path(folder) / 'tokenizer_config.json').write_text(json.dumps({'tokenizer_class': 'PreTrainedTokenizerFast', **roles}), encoding='utf-8')
    tokenizer = load_tokenizer(read_tokenizer_json(folder))
    assert tokenizer.kind == 'json'
    random_model(name, tokenizer.vocab_size).save_pretrained(folder, tokenizer)


def read_items(folder, name, tokenizer=None, count=None, block_size=None):
    """The first items of a task; with block_size, without those that have a choice of more tokens, which the harness refuses."""
    from tasks.items import prepare
    [file] = Path(folder).glob(f'{name}_*.jsonl')
    items = [json.loads(line) for line in file.read_text(encoding='utf-8').splitlines()[:count]]
    if name == 'lambada':
        items = [{'text': f'{item["query"]} {item["choices"][0]}'} for item in items]
    if block_size is None:
        return items
    return [item for item in items if all(len(ids) - start <= block_size for ids, start in prepare(name, [item], name, tokenizer=tokenizer).rows)]


def run_harness(folder, items_folder, count):
    """{task: [{'nats': log-likelihoods, 'greedy': …, 'acc': …, 'acc_norm': …} of each item], …}"""
    import lm_eval
    from lm_eval.models.huggingface import HFLM
    from lm_eval.tasks import TaskManager

    from tokens.tokenizer import load_tokenizer, read_tokenizer_json
    tokenizer = load_tokenizer(read_tokenizer_json(folder))
    tasks = Path(lm_eval.__file__).parent / 'tasks'
    model = HFLM(pretrained=str(folder), device='cpu', dtype='float32', batch_size=8)
    with tempfile.TemporaryDirectory() as work:
        for name, file in TASK_FILES.items():
            data = Path(work) / f'{name}.jsonl'
            data.write_text(''.join(json.dumps(item) + '\n' for item in read_items(items_folder, name, tokenizer, count, model.max_length)), encoding='utf-8')
            (Path(work) / f'{name}.yaml').write_text(
                f'include: {tasks / file}\ntask: local_{name}\ntag: null\ndataset_path: json\ndataset_name: null\n'
                f'dataset_kwargs:\n  data_files:\n    test: {data}\ntraining_split: null\nvalidation_split: null\ntest_split: test\n', encoding='utf-8')
        done = lm_eval.simple_evaluate(model=model, tasks=[f'local_{name}' for name in TASK_FILES], log_samples=True, bootstrap_iters=0,
                                       task_manager=TaskManager(include_path=work))
    found = {}
    for name in TASK_FILES:
        samples = sorted(done['samples'][f'local_{name}'], key=lambda sample: sample['doc_id'])
        found[name] = dict(
            summary={k.split(',')[0]: v for k, v in done['results'][f'local_{name}'].items() if isinstance(v, float)},
            items=[dict(nats=[round(float(r[0]), 5) for r in s['filtered_resps']], acc=s['acc'], **{k: s[k] for k in ('acc_norm',) if k in s})
                   for s in samples])
    return found


if __name__ == '__main__':
    items_folder, *rest = sys.argv[1:]
    if rest:
        found = {'model': run_harness(rest[0], items_folder, None)}
        Path(rest[1]).write_text(json.dumps(found['model']), encoding='utf-8')
    else:
        found = {}
        for name, count in MODELS.items():
            with tempfile.TemporaryDirectory() as folder:
                write_folder(folder, name)
                found[name] = run_harness(folder, items_folder, count)
        (ROOT / 'tests/reference_lm_eval.json').write_text(json.dumps(found) + '\n', encoding='utf-8')
    for name, tasks in found.items():
        print(name, {task: numbers['summary'] for task, numbers in tasks.items()})
