"""Command lines of the corpus commands and of data/*/prepare.py."""
import argparse
import difflib
import os
import shlex
import sys
from pathlib import Path

from corpus.readers import ERRORS, FORMATS

ROOT = Path(__file__).resolve().parents[1]
N_CORES = len(os.sched_getaffinity(0)) if hasattr(os, 'sched_getaffinity') else os.cpu_count()


def boolean(text):
    if text.lower() not in ('true', 'false', '1', '0'):
        raise argparse.ArgumentTypeError(f'{text}: accepted are True, False')
    return text.lower() in ('true', '1')


def count(text):
    if int(text) < 1:
        raise argparse.ArgumentTypeError(f'{text} must be 1 or more')
    return int(text)


def share(text):
    if not 0 < float(text) < 1:
        raise argparse.ArgumentTypeError(f'{text} must lie between 0 and 1')
    return float(text)


# the options that several commands have, as add_argument takes them
OPTIONS = {
    'input': dict(nargs='+', required=True, metavar='PATH', help='files, and folders of them'),
    'out': dict(type=Path, required=True, help='dataset folder'),
    'tokenizer': dict(required=True, metavar='NAME',
                      help='char, gpt2, byte, or a folder with tokenizer.json'),
    'eot': dict(default='', metavar='TOKEN',
                help='the token that ends a document, for a folder that names none'),
    'format': dict(choices=['auto', *FORMATS], default='auto',
                   help='format of all files (default: by the ending of each file)'),
    'field': dict(default='text',
                  help='fields that make a document, as in title,text (default: %(default)s)'),
    'encoding': dict(default='utf-8', help='of text files, such as gb18030 (default: %(default)s)'),
    'errors': dict(choices=ERRORS, default='strict',
                   help='bytes outside the encoding end the run, or become U+FFFD'),
    'clean': dict(type=boolean, nargs='?', const=True, default=False, metavar='True',
                  help='Unicode NFC, no control characters, each text only once'),
    'min_chars': dict(type=count, default=1, help='leave shorter texts out (default: %(default)s)'),
    'sample': dict(type=share, default=1.0, metavar='FRACTION',
                   help='take this share of the texts, chosen by hash (default: all)'),
    'max_docs': dict(type=count, help='take only this many documents, the first ones'),
    'val_fraction': dict(type=share, default=0.01, help='share for validation (default: %(default)s)'),
    'shard_tokens': dict(type=count, help='tokens in a .bin file (default: %(default)s)'),
    'workers': dict(type=count, default=N_CORES,
                    help='threads that tokenize (default: one per core, %(default)s)'),
}
READING = ['input', 'format', 'field', 'encoding', 'errors']
BUILDING = ['out', 'tokenizer', 'eot', 'clean', 'min_chars', 'sample', 'max_docs', 'val_fraction',
            'shard_tokens', 'workers']


class Parser(argparse.ArgumentParser):
    """argparse in the project's dialect: --key=value or --key value, --switch or --switch=True.

    options   names in OPTIONS
    defaults  of these options, instead of those in OPTIONS; such an option is not required
    """

    def __init__(self, doc, command=None, options=(), **defaults):
        super().__init__(command, description=doc, allow_abbrev=False,
                         formatter_class=argparse.RawDescriptionHelpFormatter)
        for name in options:
            settings = dict(OPTIONS[name])
            if name in defaults:
                settings.update(default=defaults[name], required=False)
            self.add_argument(f'--{name}', **settings)

    def parse_args(self, argv=None):
        args, unknown = self.parse_known_args(argv)
        if unknown:
            flag = unknown[0].split('=')[0]
            near = difflib.get_close_matches(flag, self._option_string_actions, n=1)
            remedy = f'did you mean {near[0]}?' if near else '--help lists all'
            raise ValueError(f'{flag}: unknown argument, {remedy}')
        return args

    def error(self, message):
        raise ValueError(message.removeprefix('argument '))


def run_command(doc, commands):
    """Run the command that is the first argument, {name: function of the other arguments}."""
    command = sys.argv[1] if len(sys.argv) > 1 else '--help'
    if command in ('-h', '--help'):
        print(f'{doc.strip()}\n\n{", ".join(commands)}: each has a --help that lists its options.')
    elif command in commands:
        commands[command](sys.argv[2:])
    else:
        raise ValueError(f'{command}: accepted are {", ".join(commands)}')


def print_next(out, config, *, own_dataset=None):
    """Print the training command for a dataset, quoted so that it can be pasted into a shell.

    own_dataset  name of the dataset that the config file trains on anyway, into an out_dir of its own
    """
    out = Path(out).resolve()
    name = out.name if out.parent == ROOT / 'data' else os.path.relpath(out)
    command = ['python', 'train.py', *config]
    if name != own_dataset:
        command += [f'--dataset={name}', f'--out_dir=out-{out.name}']
    print('next:', shlex.join(command))
