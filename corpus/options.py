"""Command lines of the corpus commands and of data/*/prepare.py."""
import argparse
import difflib
import os
import shlex
from pathlib import Path

from corpus.readers import ERRORS, FORMATS


class Parser(argparse.ArgumentParser):
    """argparse in the project's dialect: --key=value or --key value, --switch or --switch=True."""

    def __init__(self, doc, command=None):
        super().__init__(command, description=doc, allow_abbrev=False,
                         formatter_class=argparse.RawDescriptionHelpFormatter)

    def add_switch(self, flag, help):
        self.add_argument(flag, type=boolean, nargs='?', const=True, default=False, metavar='True', help=help)

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


def boolean(text):
    if text.lower() not in ('true', 'false', '1', '0'):
        raise argparse.ArgumentTypeError(f'{text}: accepted are True, False')
    return text.lower() in ('true', '1')


def n_cores():
    """Return the number of cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, 'sched_getaffinity') else os.cpu_count()


def add_input_option(parser, *, required=True):
    parser.add_argument('--input', nargs='+', required=required, metavar='PATH',
                        help='files, and folders of them')


def add_tokenizer_options(parser, *, required=True):
    parser.add_argument('--tokenizer', required=required, metavar='NAME',
                        help='char, gpt2, byte, or a folder with tokenizer.json')
    parser.add_argument('--eot', default='', metavar='TOKEN',
                        help='the token that ends a document, for a folder that names none')


def add_packing_options(parser, *, val_fraction, shard_tokens):
    parser.add_argument('--max_docs', type=int, help='take only this many documents, the first ones')
    parser.add_argument('--val_fraction', type=float, default=val_fraction,
                        help='share of the documents for validation (default: %(default)s)')
    parser.add_argument('--shard_tokens', type=int, default=shard_tokens,
                        help='tokens in a .bin file (default: %(default)s)')
    parser.add_argument('--workers', type=int, default=n_cores(),
                        help='threads that tokenize (default: one per core, %(default)s)')


def add_reading_options(parser):
    parser.add_argument('--format', choices=['auto', *FORMATS], default='auto',
                        help='format of all files (default: by the ending of each file)')
    parser.add_argument('--field', default='text',
                        help='fields that make a document, as in title,text (default: %(default)s)')
    parser.add_argument('--encoding', default='utf-8',
                        help='of text files, such as gb18030 (default: %(default)s)')
    parser.add_argument('--errors', choices=ERRORS, default='strict',
                        help='bytes outside the encoding end the run, or become U+FFFD')


def add_build_options(parser):
    add_reading_options(parser)
    parser.add_switch('--clean', help='Unicode NFC, no control characters, each text only once')
    parser.add_argument('--min_chars', type=int, default=1,
                        help='leave shorter texts out (default: %(default)s)')
    parser.add_argument('--sample', type=float, default=1.0, metavar='FRACTION',
                        help='take this share of the texts, chosen by hash')
    add_packing_options(parser, val_fraction=0.01, shard_tokens=None)


def check_options(args):
    """Raise ValueError for a number out of its range."""
    for name in ('max_docs', 'shard_tokens', 'workers', 'min_chars', 'tokens', 'block_size'):
        value = getattr(args, name, None)
        if value is not None and value < 1:
            raise ValueError(f'--{name}={value} must be 1 or more')
    if not 0 < getattr(args, 'val_fraction', 0.5) < 1:
        raise ValueError(f'--val_fraction={args.val_fraction} must lie between 0 and 1')
    if not 0 < getattr(args, 'sample', 1) <= 1:
        raise ValueError(f'--sample={args.sample} must be above 0, and at most 1')


def dataset_name(out):
    """Return the name that train.py's --dataset has for a folder."""
    out = Path(out).resolve()
    return out.name if out.parent == Path(__file__).resolve().parents[1] / 'data' else os.path.relpath(out)


def print_next(out, config, *, own_dataset=None, with_out_dir=True):
    """Print the training command for a dataset, quoted so that it can be pasted into a shell.

    own_dataset  name of the dataset that the config file trains on anyway, into an out_dir of its own
    """
    name, out_dir = dataset_name(out), f'out-{Path(out).resolve().name}'
    command = ['python', 'train.py', *config]
    if name != own_dataset:
        command.append(f'--dataset={name}')
        if with_out_dir:
            command.append(f'--out_dir={out_dir}')
    print('next:', shlex.join(command))
