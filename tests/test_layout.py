"""The house rules that a reader relies on, checked on the source: budgets, imports, few dependencies, nothing unsafe."""

import ast
import re
import subprocess
import sys
from graphlib import CycleError, TopologicalSorter
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
ROOMS = ('weights', 'tokens', 'corpus', 'tasks', 'training', 'serving')

MAX_LINES, MAX_FUNCTION_LINES, MAX_PARAMETERS, MAX_COLUMNS, MAX_TOP_LEVEL_FILES = 450, 50, 7, 110, 18
CORE = ('model', 'train', 'optim', 'configurator', 'sample', 'checkpoint', 'distributed', 'tokens.loader')
# the design asks for 380,000 in all
MAX_CHARACTERS_CORE, MAX_CHARACTERS = 105_000, 618_000

# a module -> the only modules of ours that it may import; 'corpus.' stands for the room
ALLOWED = {
    'files': [], 'configurator': [], 'kernels': [],
    'model': ['kernels', 'weights.'],
    'devices': ['files'],
    'distributed': ['devices', 'files'],
    'optim': ['distributed'],
}
# packages that are imported inside the functions that need them
WHERE_USED = {'datasets', 'wandb', 'tokenizers', 'matplotlib', 'safetensors', 'huggingface_hub', 'transformers', 'tiktoken', 'gguf', 'tensorboard'}


def tracked(*patterns):
    """Files that git knows, or all that match where it knows none: an unpacked archive."""
    git = subprocess.run(['git', 'ls-files', '-z', '--', *patterns], cwd=ROOT, capture_output=True)
    names = git.stdout.decode().split('\0')[:-1] if git.returncode == 0 else []
    folders = ['', 'config/', 'data/*/', 'docs/', 'launch/', 'tests/', 'dev/', *(f'{room}/' for room in ROOMS)]
    files = [ROOT / name for name in names] or [path for d in folders for kind in patterns for path in ROOT.glob(d + kind)]
    return [path for path in files if path.is_file()]


def name_of(path):
    return path.relative_to(ROOT).with_suffix('').as_posix().replace('/', '.').removesuffix('.__init__')


PROGRAM = sorted(path for path in tracked('*.py') if path.relative_to(ROOT).parts[0] not in ('tests', 'config', 'lessons'))
MODULES = {name_of(path): path for path in PROGRAM if 'prepare' not in path.name}
PREPARES = sorted(ROOT.glob('data/*/prepare.py'))
by_name = pytest.mark.parametrize('path', PROGRAM, ids=lambda path: path.relative_to(ROOT).as_posix())


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


def module_of(name):
    """The module of ours that a dotted name lies in: 'tokens.loader.Loader' -> 'tokens.loader'; None for others."""
    parts = name.split('.')
    return next(('.'.join(parts[:n]) for n in (2, 1) if '.'.join(parts[:n]) in MODULES), None)


def ours(path, inside_functions=True):
    """The modules of ours that a file imports."""
    return {module_of(name) for name, inside in imports(path) if inside_functions or not inside} - {None, name_of(path)}


# -----------------------------------------------------------------------------
# budgets


@by_name
def test_no_file_is_too_long_or_too_wide(path):
    lines = path.read_text(encoding='utf-8').splitlines()
    assert len(lines) <= MAX_LINES
    assert not [(number, len(line)) for number, line in enumerate(lines, 1) if len(line) > MAX_COLUMNS]


@by_name
def test_no_function_is_too_long_or_takes_too_much(path):
    for node in ast.walk(ast.parse(path.read_bytes())):
        if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef)):
            every = (*node.args.posonlyargs, *node.args.args, *node.args.kwonlyargs)
            parameters = [argument.arg for argument in every if argument.arg not in ('self', 'cls')]
            assert node.end_lineno - node.lineno < MAX_FUNCTION_LINES, node.name
            assert len(parameters) <= MAX_PARAMETERS, (node.name, parameters)


def test_the_program_stays_small():
    sizes = {name_of(path): len(path.read_text(encoding='utf-8')) for path in PROGRAM}
    assert sum(sizes[name] for name in CORE) <= MAX_CHARACTERS_CORE
    assert sum(sizes.values()) <= MAX_CHARACTERS


def test_the_top_level_holds_few_files():
    assert len([path for path in PROGRAM if path.parent == ROOT]) <= MAX_TOP_LEVEL_FILES
    assert len((ROOT / 'train.py').read_text(encoding='utf-8').splitlines()) <= 340
    assert len((ROOT / 'model.py').read_text(encoding='utf-8').splitlines()) <= 430


def test_train_is_a_straight_script():
    tree = ast.parse((ROOT / 'train.py').read_bytes())
    assert not [node for node in ast.walk(tree) if isinstance(node, (ast.FunctionDef, ast.ClassDef, ast.Global, ast.Nonlocal))]
    loops = [node for node in ast.walk(tree) if isinstance(node, ast.While)]
    assert len(loops) == 1 and loops[0].end_lineno - loops[0].lineno < 70


def test_data_holds_datasets_alone():
    assert all(path.name == 'prepare.py' and path.parent.parent == ROOT / 'data' for path in PROGRAM if 'data' in path.parts[len(ROOT.parts):])


# -----------------------------------------------------------------------------
# imports


def test_the_import_graph_has_no_cycle():
    graph = {name: ours(path, inside_functions=False) for name, path in MODULES.items()}
    try:
        TopologicalSorter(graph).prepare()
    except CycleError as error:
        pytest.fail(' -> '.join(error.args[1]))


@pytest.mark.parametrize('name', ALLOWED)
def test_some_modules_may_import_few_others(name):
    allowed = ALLOWED[name]
    strangers = {module for module in ours(MODULES[name]) if not any(module == a or a[-1] == '.' and module.startswith(a[:-1]) for a in allowed)}
    assert not strangers


@pytest.mark.parametrize('name', ['train', 'model', 'optim', *(name for name in MODULES if name.startswith('training.'))])
def test_training_imports_neither_corpus_nor_tasks(name):
    rooms = {module.split('.')[0] for module in ours(MODULES[name], inside_functions=False)}
    assert not rooms & {'corpus', 'tasks'}


@pytest.mark.parametrize('path', PREPARES, ids=lambda path: path.parent.name)
def test_prepare_imports_only_corpus_and_tokens(path):
    assert {module.split('.')[0] for module in ours(path)} <= {'corpus', 'tokens', 'files'}


@by_name
def test_optional_packages_are_imported_where_they_are_used(path):
    assert not {name for name, inside in imports(path) if not inside and name.split('.')[0] in WHERE_USED}


def test_training_needs_only_torch_and_numpy():
    pending, needed = ['train'], set()
    while pending:
        name = pending.pop()
        if name not in needed:
            needed.add(name)
            pending += ours(MODULES[name], inside_functions=False)
    outside = {name.split('.')[0] for module in needed for name, inside in imports(MODULES[module]) if not inside}
    assert outside - {module.split('.')[0] for module in MODULES} <= {'torch', 'numpy', *sys.stdlib_module_names}


# -----------------------------------------------------------------------------
# nothing unsafe


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


def test_ruff_finds_nothing():
    ruff = subprocess.run([sys.executable, '-m', 'ruff', 'check', '--quiet', '.'], cwd=ROOT, capture_output=True, text=True)
    if 'No module named ruff' in ruff.stderr:
        pytest.skip('ruff is not installed')
    assert ruff.returncode == 0, ruff.stdout
