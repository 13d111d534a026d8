"""The data of a training run: batches to train on and windows to evaluate."""

from typing import NamedTuple

import numpy as np
import torch

import distributed
from files import print0, printable
from tokens.dataset import dataset_folders
from tokens.loader import Loader
from tokens.stream import open_stream
from tokens.tokenizer import load_tokenizer, tokenizer_meta
from training.scoring import Interrupted, TextLoss, spread_windows, text_loss
from training.signals import signal_to_stop

ORIGINS = {'meta.pkl': 'characters from meta.pkl', 'none': "GPT-2's ids"}  # of datasets without meta.json


class EvalSet(NamedTuple):
    loader: Loader
    windows: np.ndarray  # numbers of the loader's windows to evaluate


class EvalLosses(NamedTuple):
    train: TextLoss
    val: TextLoss


class TrainingData(NamedTuple):
    train: Loader
    eval_train: EvalSet
    eval_val: EvalSet
    name: str  # the dataset setting
    style: str | None = None  # conversation template

    def describe(self, n_tokens: int) -> str:
        """Return name, size, and how many epochs n_tokens are."""
        total = self.train.n_tokens
        if not total:
            return f'{printable(self.name)}, encoded while training'
        return f'{printable(self.name)}, {total:,} tokens, {n_tokens / total:.2f} epochs'


def open_data(settings: dict, place, grad_accum: int, micro_batch_size: int,
              stored_meta: dict | None) -> TrainingData:
    """Open the dataset setting: a folder, a mixture of folders, or a stream of raw text.

    grad_accum        micro-steps of this rank in a step
    micro_batch_size  windows in each
    stored_meta       tokenizer of a stream; None = that of the setting
    """
    block_size, batch_size, dataset = settings['block_size'], settings['batch_size'], settings['dataset']
    n_eval = settings['eval_iters'] * batch_size
    ranks = dict(batch_size=micro_batch_size, grad_accum=grad_accum, rank=place.rank,
                 world_size=place.world_size, seed=settings['seed'], prefetch=place.device.type != 'cpu')
    if dataset.startswith('stream:'):
        tokenizer = load_tokenizer(stored_meta or tokenizer_meta(settings['tokenizer']))
        train, *heads = open_stream(
            dataset, tokenizer, stream_val=settings['stream_val'], fields=settings['field'],
            errors=settings['errors'], shuffle_window=settings['shuffle_window'], n_eval=n_eval,
            block_size=block_size, **ranks)
        return TrainingData(train, *(EvalSet(head, np.arange(head.n_windows)) for head in heads), dataset)

    folders, weights = dataset_folders(dataset)
    order, shape = settings['sampling'], dict(block_size=block_size, isolate=settings['isolate_documents'])
    train = Loader(folders, 'train', order=order, weights=weights, **shape, **ranks)
    order = order if order == 'documents' else 'sequential'
    loaders = [Loader(folders, split, order=order, batch_size=batch_size, **shape)
               for split in ('train', 'val')]
    for split in train.splits:
        origin = ORIGINS.get(split.meta['origin'])
        if origin:
            print0(f'{split.folder} has no meta.json: reading uint16 shards with {origin}, as nanoGPT does')
    if settings['verify_data']:
        for split in (*train.splits, *loaders[1].splits):
            print0(split.describe_checksums())
            distributed.on_first_rank(split.verify, of_each_node=True)
    for loader in (train, *loaders):
        loader.windows(np.arange(batch_size))  # ids of another tokenizer fail here
    styles = sorted({split.meta['style'] for split in train.splits if split.meta.get('style')})
    if len(styles) > 1:
        raise ValueError(f'dataset={dataset} has conversations in the styles {" and ".join(styles)}: '
                         'pack them in one')
    n_eval = n_eval or loaders[1].n_windows  # of the training split no more than of the validation split
    evals = [EvalSet(loader, spread_windows(loader, n_eval)) for loader in loaders]
    return TrainingData(train, *evals, dataset, *styles)


def count_bytes(meta: dict, place) -> torch.Tensor | None:
    """Return the bytes of each token, (V,) int64 on the device, for bits per byte.

    None for GPT-2's tokenizer if vocab.bpe is not in the cache: training does not download it.
    """
    table = distributed.on_first_rank(lambda: read_byte_counts(meta))
    return None if table is None else table.to(place.device)


def read_byte_counts(meta):
    from corpus.fetch import cache_folder
    vocabulary = cache_folder() / 'vocab.bpe'
    if meta['kind'] == 'gpt2' and not vocabulary.is_file():
        print0(f"no bits per byte: the bytes of GPT-2's tokens come from {vocabulary}, "
               'which a prepare script downloads')
        return None
    return torch.from_numpy(load_tokenizer(meta).token_bytes())


def evaluate(model, data: TrainingData, token_bytes, place, autocast) -> EvalLosses | None:
    """Measure the losses on the windows to evaluate. None after a signal to stop."""
    losses = []
    try:
        for loader, windows in (data.eval_train, data.eval_val):
            losses.append(text_loss(model, loader, windows, token_bytes=token_bytes, place=place,
                                    autocast=autocast, stop=signal_to_stop))
    except Interrupted:
        return None
    return EvalLosses(*losses)
