"""The house rules that a reader relies on, checked on the source: DESIGN.md's import map, few dependencies, nothing unsafe."""

import ast
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent

# module -> the modules of ours that it may import
MAP = {
    'model': ['pretrained'],
    'pretrained': ['checkpoint', 'tokens.tokenizer'],
    'configurator': [],
    'distributed': [],
    'corpus.fetch': [],
    'tokens.tokenizer': ['corpus.fetch', 'corpus.readers'],
    'tokens.dataset': ['tokens.tokenizer'],
    'tokens.loader': ['kernels', 'tokens.tokenizer', 'tokens.dataset'],
    'tokens.stream': ['kernels', 'tokens.tokenizer', 'corpus.readers', 'tokens.loader'],
    'corpus.readers': ['corpus.fetch'],
    'corpus.pack': ['corpus.fetch', 'tokens.tokenizer', 'corpus.readers', 'tokens.loader'],
    'corpus.conversations': ['tokens.tokenizer', 'corpus.readers', 'corpus.pack', 'corpus.fetch', 'checkpoint'],
    'optim': ['distributed'],
    'checkpoint': ['distributed'],
    'pictures': ['files'],
    'report': ['files', 'pictures'],
    'logs': ['checkpoint', 'distributed', 'report'],
    'load': ['model', 'checkpoint', 'pretrained', 'tokens.tokenizer', 'tokens.loader', 'distributed'],
    'scoring': ['distributed', 'files', 'kernels'],
    'tasks.sources': ['corpus.fetch', 'files'],
    'tasks.items': ['tasks.sources', 'scoring', 'distributed', 'files', 'tokens.tokenizer'],
    'tasks.core': ['tasks.items', 'scoring', 'files', 'tokens.tokenizer'],
    'evaluate': ['tasks.items', 'tasks.core', 'scoring', 'load', 'tokens.tokenizer', 'tokens.loader', 'distributed', 'configurator'],
}
MAP['train'] = list(MAP)
MAP.update(dict.fromkeys(['sample', 'bench'], [*MAP['train'], 'sample', 'bench']))

WHERE_USED = {'datasets', 'wandb', 'tokenizers', 'matplotlib', 'safetensors', 'huggingface_hub', 'transformers', 'tiktoken'}


def path_of(module):
    return ROOT / (module.replace('.', '/') + '.py')


MODULES = [module for module in MAP if path_of(module).exists()]
PREPARES = sorted(ROOT.glob('data/*/prepare.py'))


def imports(path):
    """[(dotted name, is it inside a function)] of every import in a file; `from a import b` is a.b."""
    found = []

    def visit(node, inside):
        if isinstance(node, ast.Import):
            found.extend((alias.name, inside) for alias in node.names)
        if isinstance(node, ast.ImportFrom):
            found.extend((f'{"." * node.level}{node.module or ""}.{alias.name}', inside) for alias in node.names)
        for child in ast.iter_child_nodes(node):
            visit(child, inside or isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef)))
    visit(ast.parse(path.read_bytes()), False)
    return found


def ours(path):
    """The modules of ours that a file imports, at any level: 'model', 'tokens.tokenizer'; '' is a relative import."""
    parts = [name.split('.') for name, _ in imports(path)]
    return {'.'.join(p[:2]) if p[0] == 'data' else p[0] for p in parts if p[0] in ('', 'data', 'config', 'tests') or path_of(p[0]).exists()}


def tracked(*patterns):
    """Files that git knows, or all that match where it knows none: an unpacked archive."""
    git = subprocess.run(['git', 'ls-files', '-z', '--', *patterns], cwd=ROOT, capture_output=True)
    names = git.stdout.decode().split('\0')[:-1] if git.returncode == 0 else []
    folders = ['', 'config/', 'data/', 'data/*/', 'docs/', 'launch/', 'tests/']
    files = [ROOT / name for name in names] or [path for d in folders for kind in patterns for path in ROOT.glob(d + kind)]
    return [path for path in files if path.is_file()]


def test_imports_are_told_apart(tmp_path):
    file = tmp_path / 'a.py'
    file.write_text('import model, corpus.fetch as f\nfrom tokens import tokenizer\nfrom corpus.pack import x\ntry:\n    import wandb\n'
                    'except ImportError:\n    pass\ndef g():\n    from train import y\n    from . import z', encoding='utf-8')
    assert imports(file) == [('model', False), ('corpus.fetch', False), ('tokens.tokenizer', False), ('corpus.pack.x', False),
                             ('wandb', False), ('train.y', True), ('..z', True)]
    assert ours(file) >= {'corpus.fetch', 'tokens.tokenizer', 'corpus.pack', ''}


@pytest.mark.parametrize('module', MODULES)
def test_imports_follow_the_map(module):
    assert ours(path_of(module)) <= set(MAP[module])


@pytest.mark.parametrize('path', PREPARES, ids=lambda path: path.parent.name)
def test_prepare_imports_only_data(path):
    assert all(module.startswith('data.') for module in ours(path))


def test_every_module_is_on_the_map():
    names = [path.relative_to(ROOT).with_suffix('').as_posix().replace('/', '.') for path in tracked('*.py')]
    strangers = {name for name in names if re.fullmatch(r'\w+|data\.\w+', name)} - set(MAP)
    assert not strangers, f'what may these import? Say it in MAP: {sorted(strangers)}'


@pytest.mark.parametrize('path', [*map(path_of, MODULES), *PREPARES], ids=lambda path: path.relative_to(ROOT).as_posix())
def test_optional_packages_are_imported_where_they_are_used(path):
    assert not {name for name, inside in imports(path) if not inside and name.split('.')[0] in WHERE_USED}


@pytest.mark.parametrize('module', [module for module in MODULES if module in [*MAP['train'], 'train']])
def test_training_needs_only_torch_and_numpy(module):
    outside = {name.split('.')[0] for name, inside in imports(path_of(module)) if not inside} - {m.split('.')[0] for m in MAP}
    assert outside <= {'torch', 'numpy', *sys.stdlib_module_names}


@pytest.mark.parametrize('pattern, kinds', [
    (r'pickle[.]loads?\b', ['*.py']),
    (r'weights_only\s*=\s*False', ['*.py']),
    (r'\bexec[(]open', ['*.py']),
    (r'(?<![\w.~-])/(tmp|work|root|home|Users)/|\b[A-Z]:\\+Users', ['*.py', '*.md', '*.sh', '*.txt', '*.ipynb']),
], ids=['unpickling', 'unsafe torch.load', 'exec of a file', 'machine path'])
def test_no_file_holds(pattern, kinds):
    found = [(path.relative_to(ROOT).as_posix(), line) for path in tracked(*kinds)
             for line in path.read_text(encoding='utf-8').splitlines() if re.search(pattern, line)]
    assert not found
