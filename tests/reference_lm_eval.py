"""What lm-evaluation-harness 0.4.13 gives for the model of tests/test_evaluate.py: writes tests/reference_lm_eval.json.

    python -m venv ref && ref/bin/pip install -r requirements.txt lm_eval==0.4.13 accelerate
    ref/bin/python tests/reference_lm_eval.py ../shared/data/evals                     # the model of the test, N_ITEMS items of each task
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

N_ITEMS = 25
TASK_FILES = dict(hellaswag='hellaswag/hellaswag.yaml', lambada='lambada/lambada_openai.yaml', arc_easy='arc/arc_easy.yaml', piqa='piqa/piqa.yaml',
                  winogrande='winogrande/default.yaml', copa='super_glue/copa/default.yaml', openbookqa='openbookqa/openbookqa.yaml')


def random_model(block_size=80):
    """A GPT-2 of seeded weights, so large that its guesses are far from even, and so short that long rows are cut."""
    from model import GPT, GPTConfig
    model = GPT(GPTConfig(block_size=block_size, vocab_size=50304, n_layer=2, n_head=2, n_embd=16))
    draw = torch.Generator().manual_seed(8)
    with torch.no_grad():
        for name, p in model.named_parameters():
            if p.dim() > 1:
                p.normal_(std=0.5, generator=draw)
    return model


def read_items(folder, name, count=None, block_size=None):
    """The first items of a task; with block_size, without those that have a choice of more tokens, which the harness refuses."""
    from tasks.items import prepare
    from tokens.tokenizer import GPT2Tokenizer
    [file] = Path(folder).glob(f'{name}_*.jsonl')
    items = [json.loads(line) for line in file.read_text(encoding='utf-8').splitlines()[:count]]
    if name == 'lambada':
        items = [{'text': f'{item["query"]} {item["choices"][0]}'} for item in items]
    if block_size is None:
        return items
    tokenizer = GPT2Tokenizer()
    return [item for item in items if all(len(ids) - start <= block_size for ids, start in prepare(name, [item], name, tokenizer=tokenizer).rows)]


def run_harness(folder, items_folder, count):
    """{task: [{'nats': log-likelihoods, 'greedy': …, 'acc': …, 'acc_norm': …} of each item], …}"""
    import lm_eval
    from lm_eval.models.huggingface import HFLM
    from lm_eval.tasks import TaskManager
    tasks = Path(lm_eval.__file__).parent / 'tasks'
    model = HFLM(pretrained=str(folder), device='cpu', dtype='float32', batch_size=8)
    with tempfile.TemporaryDirectory() as work:
        for name, file in TASK_FILES.items():
            data = Path(work) / f'{name}.jsonl'
            data.write_text(''.join(json.dumps(item) + '\n' for item in read_items(items_folder, name, count, model.max_length)), encoding='utf-8')
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
        found = run_harness(rest[0], items_folder, None)
        Path(rest[1]).write_text(json.dumps(found), encoding='utf-8')
    else:
        from tokens.tokenizer import GPT2Tokenizer
        with tempfile.TemporaryDirectory() as folder:
            random_model().save_pretrained(folder, GPT2Tokenizer())
            found = run_harness(folder, items_folder, N_ITEMS)
        (ROOT / 'tests/reference_lm_eval.json').write_text(json.dumps(found) + '\n', encoding='utf-8')
    print({name: task['summary'] for name, task in found.items()})
